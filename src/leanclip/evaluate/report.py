"""What an evaluation measured: a model and data sets in; figures, words and results out.

    tasks -> features over all ranks -> a result per task -> figures, intervals, sentences -> Report

Training and `leanclip eval` share it. Every rank calls `evaluate` and gets the figures; the first
one has the rest, too.
"""

import json
import logging
import platform
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from leanclip.data.samples import fill
from leanclip.distributed import everyones, rank_and_world_size, share_buffers
from leanclip.evaluate.classification import Classification
from leanclip.evaluate.features import Encoded, encode_dataset, encode_texts
from leanclip.evaluate.guard import PREFIX, comparison
from leanclip.evaluate.intervals import LEVEL, RESAMPLES, Interval
from leanclip.evaluate.retrieval import RetrievalResult, retrieve
from leanclip.evaluate.tasks import Task
from leanclip.evaluate.zero_shot import ZeroShotResult, build_classifier, zero_shot
from leanclip.images import Preprocess
from leanclip.model import CLIP
from leanclip.model.lora import merged_state
from leanclip.tracking import write_text
from leanclip.weights import fingerprint

log = logging.getLogger("leanclip")

FILE = "report.json"
EXAMPLES = 8  # pairs kept for the picture of similarities
PREDICTIONS = 24  # images kept for the picture of predictions

Result = ZeroShotResult | Classification | RetrievalResult


@dataclass
class Report:
    """Figures by name, a plain sentence on each task, and what they were worked out from."""

    metrics: dict[str, float] = field(default_factory=dict)
    intervals: dict[str, Interval] = field(default_factory=dict)  # 95%, by names of metrics
    sentences: list[str] = field(default_factory=list)
    results: dict[str, Result] = field(default_factory=dict)  # by names of tasks; "guard/..." too
    tasks: dict[str, Task] = field(default_factory=dict)  # whose data the results are of
    examples: list[tuple[Path | bytes, str]] = field(default_factory=list)  # image, its text
    similarity: torch.Tensor = field(default_factory=lambda: torch.empty(0, 0))  # of the examples
    predictions: list[tuple[Path | bytes, str, str]] = field(default_factory=list)  # said, meant
    bad: dict[str, str] = field(default_factory=dict)  # id -> reason
    before: dict[str, float] = field(default_factory=dict)  # figures before fine-tuning
    weights: str = ""  # weights.fingerprint of the model's state
    data: dict[str, dict[str, Any]] = field(default_factory=dict)  # by names of tasks
    source: str = ""  # where the weights are
    command: str = ""  # that measures the same again

    def facts(self) -> dict[str, Any]:
        """What `report.json` holds, as plain values: docs/evaluate.md describes them."""
        found = {
            "metrics": self.metrics,
            "intervals": self.intervals,
            "interval_level": LEVEL,
            "resamples": RESAMPLES,
            "sentences": self.sentences,
            "weights": {"source": self.source, "sha256": self.weights},
            "data": self.data,
            "command": self.command,
            "versions": _versions(),
            "classes": {k: _classes(r) for k, r in self.results.items() if _has_classes(r)},
            "bad": self.bad,
        }
        return found | ({"before": self.before} if self.before else {})

    def write(self, folder: Path) -> None:
        """Write `report.json` in an existing folder."""
        write_text(folder / FILE, _json(self.facts()) + "\n")


def evaluate(
    model: CLIP,
    tasks: Sequence[Task],
    preprocess: Preprocess,
    *,
    guard: Task | None = None,
    before: Mapping[str, float] | None = None,
) -> Report:
    """Measure every task; the guard's figures are under `guard/`.

    `before` are the figures before fine-tuning, which a sentence on the guard compares.

    Raises:
        DataError: more than the allowed share of a data set is unreadable.
    """
    report = Report()
    with _as_in_use(model):
        share_buffers(model)
        report.weights = fingerprint(merged_state(model))
        for task in tasks:
            _measure(model, task, preprocess, report)
        if guard is not None:
            own = Report()
            _measure(model, guard, preprocess, own)
            _add_guard(report, own, guard, tasks, before or {})
    report.metrics = everyones(report.metrics)[0]
    return report


@contextmanager
def _as_in_use(model: CLIP) -> Iterator[None]:
    """A ResNet's BatchNorms use what they have learned; a locked tower's do so in training too."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _add_guard(
    report: Report, own: Report, guard: Task, tasks: Sequence[Task], before: Mapping[str, float]
) -> None:
    if rank_and_world_size()[0] > 0:
        return
    report.metrics |= {PREFIX + name: value for name, value in own.metrics.items()}
    report.intervals |= {PREFIX + name: both for name, both in own.intervals.items()}
    report.results |= {PREFIX + name: result for name, result in own.results.items()}
    report.tasks |= {PREFIX + name: task for name, task in own.tasks.items()}
    report.data |= {PREFIX + name: facts for name, facts in own.data.items()}
    report.bad |= own.bad
    report.before = dict(before)
    report.sentences.append(comparison(guard, tasks, before, report.metrics))


def _measure(model: CLIP, task: Task, preprocess: Preprocess, report: Report) -> None:
    """Add a task to the report; all ranks encode, the first one measures."""
    images = encode_dataset(
        model,
        task.dataset,
        task.data,
        preprocess,
        batch_size=task.batch_size,
        limit=task.limit,
        label=f"evaluating {task.name}",
    )
    report.bad |= images.bad
    result: Result
    if task.name == "zero_shot":
        classifier = build_classifier(
            model, task.dataset.classes, task.dataset.templates, batch_size=task.batch_size
        )
        if rank_and_world_size()[0] > 0:
            return
        result = zero_shot(
            images,
            classifier,
            classes=task.dataset.classes,
            templates=task.dataset.templates,
            scale=model.logit_scale.exp().item(),
            device=model.logit_scale.device,
        )
        _say_zero_shot(task, result, report)
    else:
        captions = [caption for several in images.captions for caption in several]
        texts = encode_texts(model, captions, batch_size=task.batch_size, shared=True)
        if rank_and_world_size()[0] > 0:
            return
        owners = [i for i, several in enumerate(images.captions) for _ in several]
        result = retrieve(
            images.features,
            texts,
            torch.tensor(owners),
            captions=captions,
            indices=images.indices,
            device=model.logit_scale.device,
        )
        _say_retrieval(task, result, report)
    report.results[task.name], report.tasks[task.name] = result, task
    report.data[task.name] = _data_facts(task, images)


def _say_zero_shot(task: Task, result: ZeroShotResult, report: Report) -> None:
    figures, classes = result.figures(), result.classes
    report.metrics |= {f"zeroshot_{name}": value for name, value in figures.items()}
    report.intervals |= {f"zeroshot_{name}": both for name, both in result.intervals().items()}
    about = f", {task.dataset.about}," if task.dataset.about else ""
    report.sentences.append(
        f"It names the right one of {len(classes)} classes{about} for "
        f"{figures['top1']:.1%} of {len(result.labels)} images "
        f"(guessing: {1 / len(classes):.1%}); the right one is among its first "
        f"{min(5, len(classes))} for {figures['top5']:.1%}."
    )
    labels: list[int] = result.labels.tolist()
    indices: list[int] = result.indices.tolist()
    said: list[int] = result.top_classes[:, 0].tolist()
    shown = range(0, len(labels), -(-len(labels) // PREDICTIONS))
    report.predictions = [
        (task.dataset[indices[i]].image, classes[said[i]], classes[labels[i]]) for i in shown
    ]
    if not report.examples:
        firsts = {label: row for row, label in reversed(list(enumerate(labels)))}
        rows = [firsts[label] for label in sorted(firsts)[:EXAMPLES]]
        report.examples = [
            (task.dataset[indices[i]].image, fill(result.templates[:1], classes[labels[i]])[0])
            for i in rows
        ]
        shown_classes = result.classifier[[labels[i] for i in rows]]
        report.similarity = shown_classes @ result.features[rows].T


def _say_retrieval(task: Task, result: RetrievalResult, report: Report) -> None:
    figures = result.figures()
    report.metrics |= figures
    report.intervals |= result.intervals()
    report.sentences.append(
        f"Among {len(result.captions)} captions, it finds one of an image's own first for "
        f"{figures['image_to_text_R@1']:.1%} of {len(result.indices)} images; among the images, "
        f"it finds a caption's own first for {figures['text_to_image_R@1']:.1%}."
    )
    owners: list[int] = result.owners.tolist()
    firsts = [owners.index(i) for i in range(min(EXAMPLES, len(result.indices)))]
    report.examples = [
        (task.dataset[int(result.indices[i])].image, result.captions[first])
        for i, first in enumerate(firsts)
    ]
    report.similarity = result.text_features[firsts] @ result.features[: len(firsts)].T


def _data_facts(task: Task, images: Encoded) -> dict[str, Any]:
    data = task.data
    return {
        "layout": data.layout,
        "root": data.root,
        "split": data.split,
        "samples": len(images.indices),
        "limit": task.limit,
        "sha256": images.fingerprint(task.dataset.classes),
    }


def _has_classes(result: Result) -> bool:
    return isinstance(result, Classification)


def _classes(result: Result) -> dict[str, Any]:
    """The table of classes, and the mistakes, most frequent first, and all of them by label."""
    assert isinstance(result, Classification)
    names, counts = result.classes, result.confusion()
    cells = counts.nonzero().tolist()
    return {
        "per_class": result.per_class(),
        "most_confused": [
            {"is": names[label], "said": names[said], "images": images}
            for label, said, images in result.most_confused()
        ],
        "confusion": [[label, said, int(counts[label, said])] for label, said in cells],
    }


def _versions() -> dict[str, str]:
    names = ("leanclip", "torch", "numpy", "pillow")
    return {"python": platform.python_version()} | {name: version(name) for name in names}


def _json(value: Any, depth: int = 0) -> str:
    """JSON with a line per entry of the outer groups, and inner ones on one line."""
    pad = " " * (depth + 1)
    if depth < 3 and isinstance(value, dict) and value:
        inner = (f"{pad}{json.dumps(k)}: {_json(v, depth + 1)}" for k, v in value.items())
        return "{\n" + ",\n".join(inner) + f"\n{pad[1:]}}}"
    if depth < 4 and isinstance(value, list) and value and isinstance(value[0], dict | str):
        inner = (f"{pad}{json.dumps(one)}" for one in value)
        return "[\n" + ",\n".join(inner) + f"\n{pad[1:]}]"
    return json.dumps(value)
