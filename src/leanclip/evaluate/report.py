"""What an evaluation measured: a model and data sets in; figures, words and samples out."""

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch

from leanclip.data.loader import evaluation_batches
from leanclip.data.samples import fill
from leanclip.data.skipped import BadSamples
from leanclip.errors import DataError
from leanclip.evaluate.features import encode_images, encode_texts
from leanclip.evaluate.guard import PREFIX, comparison
from leanclip.evaluate.retrieval import retrieval_metrics
from leanclip.evaluate.tasks import Task
from leanclip.evaluate.zero_shot import build_classifier, zero_shot_metrics
from leanclip.images import Preprocess
from leanclip.model import CLIP
from leanclip.tracking import ProgressBar

log = logging.getLogger("leanclip")

EXAMPLES = 8  # pairs kept for the picture of similarities
PREDICTIONS = 24  # images kept for the picture of predictions


@dataclass
class Report:
    """Figures by name, a plain sentence on each task, and a few pairs to look at."""

    metrics: dict[str, float] = field(default_factory=dict)
    sentences: list[str] = field(default_factory=list)
    examples: list[tuple[Path | bytes, str]] = field(default_factory=list)  # image, its text
    similarity: torch.Tensor = field(default_factory=lambda: torch.empty(0, 0))  # of the examples
    predictions: list[tuple[Path | bytes, str, str]] = field(default_factory=list)  # said, meant
    bad: dict[str, str] = field(default_factory=dict)  # id -> reason
    before: dict[str, float] = field(default_factory=dict)  # figures before fine-tuning

    def write(self, folder: Path) -> None:
        """Write the figures and sentences to `evaluation.json` in an existing folder."""
        facts = {"metrics": self.metrics, "sentences": self.sentences, "bad": self.bad}
        facts |= {"before": self.before} if self.before else {}
        (folder / "evaluation.json").write_text(json.dumps(facts, indent=1) + "\n")


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
    report, training = Report(), [module for module in model.modules() if module.training]
    model.eval()  # a ResNet's BatchNorms use what they have learned
    for task in tasks:
        seen = _encode_images(model, task, preprocess, report)
        measure = _zero_shot if task.name == "zero_shot" else _retrieval
        measure(model, task, seen, report)
    if guard is not None:
        _measure_guard(model, guard, tasks, preprocess, before or {}, report)
    for module in training:  # not a locked tower's BatchNorms
        module.training = True
    return report


def _measure_guard(
    model: CLIP,
    guard: Task,
    tasks: Sequence[Task],
    preprocess: Preprocess,
    before: Mapping[str, float],
    report: Report,
) -> None:
    own = evaluate(model, [guard], preprocess)
    report.metrics |= {f"{PREFIX}{name}": value for name, value in own.metrics.items()}
    report.bad |= own.bad
    report.before = dict(before)
    report.sentences.append(comparison(guard, tasks, before, report.metrics))


class _Seen(NamedTuple):
    """The readable images of a task."""

    features: torch.Tensor  # (N, E), of unit length
    indices: list[int]  # in the data set
    labels: torch.Tensor  # (N,)
    captions: list[Sequence[str]]


def _encode_images(model: CLIP, task: Task, preprocess: Preprocess, report: Report) -> _Seen:
    bad = BadSamples(len(task.dataset), task.data.max_bad_share)
    features, indices, labels, captions = [], [], [], []
    total = min(len(task.dataset), task.limit or len(task.dataset))
    done = 0
    batches = evaluation_batches(
        task.dataset,
        task.data,
        resolution=preprocess.resolution,
        context_length=model.context_length,
        batch_size=task.batch_size,
        limit=task.limit,
    )
    with ProgressBar(f"evaluating {task.name}", total) as bar:
        for batch in batches:
            for reason in bad.add(batch.bad):
                log.warning("skipped: %s", reason)
            report.bad |= {one.id: one.reason for one in batch.bad}
            if len(batch):
                features.append(encode_images(model, batch, preprocess))
                indices += batch.indices.tolist()
                labels.append(batch.labels)
                captions += batch.captions
            done += len(batch) + len(batch.bad)
            bar.update(done)
    if not indices:
        raise DataError(f"evaluate.{task.name}: none of the images of {task.data.root} is readable")
    return _Seen(torch.cat(features), indices, torch.cat(labels), captions)


def _zero_shot(model: CLIP, task: Task, seen: _Seen, report: Report) -> None:
    classes, templates = task.dataset.classes, task.dataset.templates
    classifier = build_classifier(model, classes, templates, batch_size=task.batch_size)
    scores = seen.features @ classifier.T  # (N, C)
    metrics = zero_shot_metrics(scores, seen.labels)
    report.metrics |= metrics
    about = f", {task.dataset.about}," if task.dataset.about else ""
    report.sentences.append(
        f"It names the right one of {len(classes)} classes{about} for "
        f"{metrics['zeroshot_top1']:.1%} of {len(seen.labels)} images "
        f"(guessing: {1 / len(classes):.1%}); the right one is among its first "
        f"{min(5, len(classes))} for {metrics['zeroshot_top5']:.1%}."
    )
    labels: list[int] = seen.labels.tolist()
    said: list[int] = scores.argmax(dim=1).tolist()
    shown = range(0, len(labels), -(-len(labels) // PREDICTIONS))
    report.predictions = [
        (task.dataset[seen.indices[i]].image, classes[said[i]], classes[labels[i]]) for i in shown
    ]
    if not report.examples:
        firsts = {label: row for row, label in reversed(list(enumerate(labels)))}
        rows = [firsts[label] for label in sorted(firsts)[:EXAMPLES]]
        report.examples = [
            (task.dataset[seen.indices[i]].image, fill(templates[:1], classes[labels[i]])[0])
            for i in rows
        ]
        report.similarity = scores[rows][:, [labels[i] for i in rows]].T


def _retrieval(model: CLIP, task: Task, seen: _Seen, report: Report) -> None:
    captions = [caption for several in seen.captions for caption in several]
    owners = [i for i, several in enumerate(seen.captions) for _ in several]
    texts = encode_texts(model, captions, batch_size=task.batch_size)
    scores = seen.features @ texts.T  # (N, M)
    metrics = retrieval_metrics(scores, torch.tensor(owners))
    report.metrics |= metrics
    report.sentences.append(
        f"Among {len(captions)} captions, it finds one of an image's own first for "
        f"{metrics['image_to_text_R@1']:.1%} of {len(seen.indices)} images; among the images, it "
        f"finds a caption's own first for {metrics['text_to_image_R@1']:.1%}."
    )
    report.examples = [
        (task.dataset[index].image, several[0])
        for index, several in zip(seen.indices[:EXAMPLES], seen.captions, strict=False)
    ]
    firsts = [owners.index(i) for i in range(len(report.examples))]
    report.similarity = scores[: len(firsts)][:, firsts].T
