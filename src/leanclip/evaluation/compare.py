"""Two models on the same samples: metrics of both, differences, and their significance.

    A, B, data -> predictions of both, sample by sample -> differences with intervals,
    McNemar's tests, changed samples

Shapes: N samples, R resamples.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from leanclip.errors import DataError
from leanclip.evaluation.classification import Classification, mean_per_class
from leanclip.evaluation.evaluator import evaluate, metric_prefix
from leanclip.evaluation.results import Report
from leanclip.evaluation.retrieval import AT, WAYS, RetrievalResult
from leanclip.evaluation.statistics import Interval, McNemar, bootstrap, mcnemar, mean_by_group
from leanclip.evaluation.tasks import Task
from leanclip.model import CLIP
from leanclip.preprocess.images import Preprocess

Mean = Callable[[np.ndarray, np.ndarray], np.ndarray]  # is correct (N,), drawn (R, N) -> (R,)


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
    """A sample that only one of the two got right."""

    id: str
    index: int  # in the data set
    truth: str
    first: str  # the models' predictions
    second: str


@dataclass
class Comparison:
    """The result; tests and changes by the names of metrics."""

    names: tuple[str, str]
    reports: tuple[Report, Report]
    differences: list[Difference] = field(default_factory=list)
    tests: dict[str, McNemar] = field(default_factory=dict)
    better: dict[str, list[Change]] = field(default_factory=dict)  # only the second is correct
    worse: dict[str, list[Change]] = field(default_factory=dict)


def compare(
    first: tuple[CLIP, Preprocess],
    second: tuple[CLIP, Preprocess],
    names: tuple[str, str],
    tasks: Sequence[Task],
) -> Comparison:
    """Evaluate both models, each with its preprocessing, on the same samples of every task.

    Raises:
        DataError: too much of the data is unreadable, or one model reads images that the other
            does not.
    """
    reports = tuple(evaluate(model, tasks, preprocess) for model, preprocess in (first, second))
    found = Comparison(names, (reports[0], reports[1]))
    for task in tasks:
        one, other = (report.results[task.name] for report in reports)
        if one.indices.tolist() != other.indices.tolist():
            raise DataError(
                f"{task.data.root}: the two models can read different images of it; find them "
                f"with leanclip eval, and remove them"
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

    def by_class(is_correct: np.ndarray, drawn: np.ndarray) -> np.ndarray:
        return mean_per_class(is_correct[drawn], labels[drawn], len(names))

    def mean(is_correct: np.ndarray, drawn: np.ndarray) -> np.ndarray:
        return is_correct[drawn].mean(axis=1)

    ranks, prefix = (one.ranks, other.ranks), metric_prefix(task.name)
    _add_difference(found, f"{prefix}top1", [rank == 1 for rank in ranks], mean, size)
    _add_difference(found, f"{prefix}top5", [rank <= 5 for rank in ranks], mean, size)
    _add_difference(found, f"{prefix}mean_per_class", [rank == 1 for rank in ranks], by_class, size)

    def change(row: int) -> Change:
        index = int(one.indices[row])
        first, second = (names[int(result.top_classes[row, 0])] for result in (one, other))
        return Change(task.dataset.name(index), index, names[int(labels[row])], first, second)

    _add_changes(found, f"{prefix}top1", ranks, change)


def _add_retrieval(
    found: Comparison, task: Task, one: RetrievalResult, other: RetrievalResult
) -> None:
    name, size, captions = task.dataset.name, len(one.indices), one.captions

    def image_change(row: int) -> Change:
        index = int(one.indices[row])
        first, second = (captions[int(r.top_captions[row, 0])] for r in (one, other))
        return Change(name(index), index, captions[one.first_caption(row)], first, second)

    def caption_change(caption: int) -> Change:
        index = int(one.indices[int(one.owners[caption])])
        first, second = (name(int(one.indices[r.top_images[caption, 0]])) for r in (one, other))
        return Change(name(index), index, captions[caption], first, second)

    for way in WAYS:
        is_of_images = way == "image_to_text"
        ranks = [r.image_ranks if is_of_images else r.caption_ranks for r in (one, other)]
        owners = np.arange(size) if is_of_images else one.owners.numpy()

        def recall(
            is_correct: np.ndarray, drawn: np.ndarray, owners: np.ndarray = owners
        ) -> np.ndarray:
            return mean_by_group(is_correct, owners, drawn)

        for k in AT:
            _add_difference(found, f"{way}_R@{k}", [rank <= k for rank in ranks], recall, size)
        change, groups = (image_change, None) if is_of_images else (caption_change, one.owners)
        _add_changes(found, f"{way}_R@1", (ranks[0], ranks[1]), change, groups)


def _add_difference(
    found: Comparison, name: str, is_correct: Sequence[torch.Tensor], mean: Mean, size: int
) -> None:
    """Add a metric, a mean over `size` images, and its difference over the same resamples."""
    first, second = (one.numpy() for one in is_correct)
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
    """Add McNemar's test of rank 1, and the samples that only one model got right, by index."""
    first, second = (rank == 1 for rank in ranks)
    found.tests[name] = mcnemar(first, second, groups)
    for kind, rows in ((found.better, ~first & second), (found.worse, first & ~second)):
        changes = [change(row) for row in rows.nonzero()[:, 0].tolist()]
        kind[name] = sorted(changes, key=lambda one: one.index)
