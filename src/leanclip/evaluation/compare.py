"""Two models on the same samples: metrics of both, differences, and their significance.

    A, B, data -> predictions of both, sample by sample -> differences with intervals,
    McNemar's tests, what changed; report/compare_page.py writes them

Each model prepares images as it was trained to; they are decoded once where both want one size.

Shapes: N samples, R resamples.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from leanclip.errors import DataError
from leanclip.evaluation import Report, Task
from leanclip.evaluation.classification import Classification, mean_per_class
from leanclip.evaluation.evaluator import PREFIXES
from leanclip.evaluation.intervals import LEVEL, RESAMPLES, Interval, bootstrap, mean_by_group
from leanclip.evaluation.multi_model import evaluate_each
from leanclip.evaluation.retrieval import AT, WAYS, RetrievalResult
from leanclip.evaluation.significance import McNemar, mcnemar
from leanclip.model import CLIP
from leanclip.preprocess.images import Preprocess


@dataclass(frozen=True)
class Difference:
    """A metric of both models on the same samples."""

    name: str
    first: float
    second: float
    interval: Interval  # of second - first

    @property
    def difference(self) -> float:
        """Above 0 the second is better."""
        return self.second - self.first


@dataclass(frozen=True)
class Change:
    """One sample that only one of the two got right."""

    id: str
    index: int  # in the data set
    truth: str
    first: str  # what the models said
    second: str


@dataclass
class Comparison:
    """The result; tests and changes by the names of metrics."""

    names: tuple[str, str]
    reports: tuple[Report, Report]
    differences: list[Difference] = field(default_factory=list)
    tests: dict[str, McNemar] = field(default_factory=dict)
    better: dict[str, list[Change]] = field(default_factory=dict)
    worse: dict[str, list[Change]] = field(default_factory=dict)

    def facts(self) -> dict[str, Any]:
        """What `compare.json` holds."""
        return {
            "models": [
                {
                    "source": name,
                    "sha256": report.weights,
                    "metrics": report.facts()["metrics"],
                }
                for name, report in zip(self.names, self.reports, strict=True)
            ],
            "data": self.reports[0].data,
            "differences": {
                one.name: {
                    "first": one.first,
                    "second": one.second,
                    "difference": one.difference,
                    "interval": one.interval,
                }
                for one in self.differences
            },
            "interval_level": LEVEL,
            "resamples": RESAMPLES,
            "mcnemar": {name: vars(test) for name, test in self.tests.items()},
            "better": {name: [vars(one) for one in some] for name, some in self.better.items()},
            "worse": {name: [vars(one) for one in some] for name, some in self.worse.items()},
            "bad": self.reports[0].bad,
        }


def compare(
    first: tuple[CLIP, Preprocess],
    second: tuple[CLIP, Preprocess],
    names: tuple[str, str],
    tasks: Sequence[Task],
) -> Comparison:
    """Measure both models, each with its preprocessing, on the same samples of every task.

    Raises:
        DataError: too much of the data is unreadable, or one model reads images that the other
            does not.
    """
    reports = evaluate_each([first, second], tasks)
    found = Comparison(names, (reports[0], reports[1]))
    for task in tasks:
        one, other = (report.results[task.name] for report in reports)
        if one.indices.tolist() != other.indices.tolist():
            raise DataError(
                f"{task.data.root}: the two models can read different images of it; see with "
                f"leanclip eval which, and remove them"
            )
        if isinstance(one, Classification) and isinstance(other, Classification):
            _add_classification(found, task, one, other)
        elif isinstance(one, RetrievalResult) and isinstance(other, RetrievalResult):
            _add_retrieval(found, task, one, other)
    return found


def _add_classification(
    found: Comparison, task: Task, one: Classification, other: Classification
) -> None:
    labels, names = one.labels.numpy(), one.classes
    size = len(labels)

    def by_class(right: np.ndarray, drawn: np.ndarray) -> np.ndarray:
        return mean_per_class(right[drawn], labels[drawn], len(names))

    ranks, prefix = (one.ranks, other.ranks), PREFIXES[task.name]
    _add_difference(found, f"{prefix}_top1", [rank == 1 for rank in ranks], _mean, size)
    _add_difference(found, f"{prefix}_top5", [rank <= 5 for rank in ranks], _mean, size)
    _add_difference(
        found, f"{prefix}_mean_per_class", [rank == 1 for rank in ranks], by_class, size
    )

    def change(row: int) -> Change:
        index = int(one.indices[row])
        first, second = (names[int(result.top_classes[row, 0])] for result in (one, other))
        return Change(task.dataset.name(index), index, names[int(labels[row])], first, second)

    _add_changes(found, f"{prefix}_top1", ranks, change)


def _add_retrieval(
    found: Comparison, task: Task, one: RetrievalResult, other: RetrievalResult
) -> None:
    name, size, owners = task.dataset.name, len(one.indices), one.owners.numpy()
    firsts: dict[int, int] = {}
    for caption, owner in enumerate(one.owners.tolist()):
        firsts.setdefault(owner, caption)
    for way in WAYS:
        is_of_images = way == "image_to_text"
        ranks = tuple(r.image_ranks if is_of_images else r.caption_ranks for r in (one, other))
        images = np.arange(size) if is_of_images else owners

        def recall(right: np.ndarray, drawn: np.ndarray, images: np.ndarray = images) -> np.ndarray:
            return mean_by_group(right, images, drawn)

        for k in AT:
            _add_difference(found, f"{way}_R@{k}", [rank <= k for rank in ranks], recall, size)

        def image_change(row: int) -> Change:
            index = int(one.indices[row])
            first, second = (one.captions[int(r.top_captions[row, 0])] for r in (one, other))
            return Change(name(index), index, one.captions[firsts[row]], first, second)

        def caption_change(caption: int) -> Change:
            index = int(one.indices[int(one.owners[caption])])
            first, second = (name(int(one.indices[r.top_images[caption, 0]])) for r in (one, other))
            return Change(name(index), index, one.captions[caption], first, second)

        change = image_change if is_of_images else caption_change
        groups = None if is_of_images else one.owners
        _add_changes(found, f"{way}_R@1", (ranks[0], ranks[1]), change, groups)


def _mean(right: np.ndarray, drawn: np.ndarray) -> np.ndarray:
    return right[drawn].mean(axis=1)


def _add_difference(
    found: Comparison,
    name: str,
    right: Sequence[torch.Tensor],
    mean: Callable[[np.ndarray, np.ndarray], np.ndarray],
    size: int,
) -> None:
    """A metric that is some mean of what is right, and its difference over the same resamples.

    `size` is how many images there are to draw from.
    """
    first, second = (one.numpy() for one in right)
    everything = np.arange(size)[None]
    intervals = bootstrap(size, lambda drawn: {name: mean(second, drawn) - mean(first, drawn)})
    values = [float(mean(one, everything)[0]) for one in (first, second)]
    found.differences.append(Difference(name, values[0], values[1], intervals[name]))


def _add_changes(
    found: Comparison,
    name: str,
    ranks: tuple[torch.Tensor, torch.Tensor],
    change: Callable[[int], Change],
    groups: torch.Tensor | None = None,
) -> None:
    """McNemar's test on who is first, and every sample that only one got right, by index."""
    first, second = (rank == 1 for rank in ranks)
    found.tests[name] = mcnemar(first, second, groups)
    for kind, rows in ((found.better, ~first & second), (found.worse, first & ~second)):
        changes = [change(row) for row in rows.nonzero()[:, 0].tolist()]
        kind[name] = sorted(changes, key=lambda one: one.index)
