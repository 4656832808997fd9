"""Evaluation: a model and tasks in, a report out; training and `leanclip eval` share it.

    tasks -> features over all ranks -> a result per task -> metrics, intervals -> Report

Every rank calls `evaluate` and gets the metrics; the first one also gets the rest.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from leanclip.config.data import DataConfig
from leanclip.data import Dataset
from leanclip.data.dataset import fill
from leanclip.data.splits import split_in_use
from leanclip.distributed.collectives import all_gather_object, rank_and_world_size, share_buffers
from leanclip.evaluation.classification import Classification, classify
from leanclip.evaluation.features import Encoded, encode_dataset, encode_texts
from leanclip.evaluation.probe import (
    Labelled,
    ProbeResult,
    draw_per_class,
    linear_probe,
    neighbour_votes,
    scores_of,
)
from leanclip.evaluation.results import Report, Result
from leanclip.evaluation.retention import PREFIX
from leanclip.evaluation.retrieval import RetrievalResult, retrieve
from leanclip.evaluation.tasks import Part, Task
from leanclip.evaluation.zero_shot import (
    ZeroShotResult,
    build_classifier,
    zero_shot,
)
from leanclip.model import CLIP
from leanclip.model.lora import merged_state
from leanclip.preprocess.images import Preprocess
from leanclip.weights import fingerprint

EXAMPLES = 8  # pairs kept for the picture of similarities
PREDICTIONS = 24  # images kept for the picture of predictions
PREFIXES = {"zero_shot": "zeroshot", "linear_probe": "linear_probe", "knn": "knn"}


def evaluate(
    model: CLIP,
    tasks: Sequence[Task],
    preprocess: Preprocess,
    *,
    retention: Task | None = None,
    baseline: Mapping[str, float] | None = None,
) -> Report:
    """Measure every task; the retention benchmark's metrics are under `retention/`.

    Args:
        model: the same on every rank, but for the statistics of BatchNorms: the first one's count.
        tasks: what to measure, on which data.
        preprocess: of the model.
        retention: the task that is not to be forgotten.
        baseline: the metrics before fine-tuning.

    Raises:
        DataError: more than the allowed share of a data set is unreadable.
    """
    report = Report()
    with _as_in_use(model):
        share_buffers(model)
        report.weights = fingerprint(merged_state(model))
        measuring = Evaluator(model, preprocess)
        for task in tasks:
            measuring.add(task, report)
        if retention is not None:
            own = Report()
            measuring.add(retention, own)
            _add_retention(report, own, baseline or {})
    report.metrics = all_gather_object(report.metrics)[0]
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


class Evaluator:
    """A model on its way through tasks; what one has encoded the next finds.

    Args:
        model: in evaluation mode.
        preprocess: of the model.

    Attributes:
        encoded: images by `key_of`; what is put there is not encoded.
    """

    def __init__(self, model: CLIP, preprocess: Preprocess) -> None:
        self.model, self.preprocess = model, preprocess
        self.device = model.logit_scale.device
        self.encoded: dict[str, Encoded] = {}

    def add(self, task: Task, report: Report) -> None:
        """Measure a task; all ranks encode, the first one computes the metrics."""
        images = self._encode(task.data, task.dataset, task, task.limit)
        report.bad |= images.bad
        result: Result | None
        if task.name == "zero_shot":
            result = self._zero_shot(task, images)
        elif task.name == "retrieval":
            result = self._retrieval(task, images)
        else:
            result = self._probe(task, images)
        if result is None:
            return
        report.results[task.name], report.tasks[task.name] = result, task
        report.data[task.name] = _data_facts(task, images)
        if isinstance(result, Classification):
            prefix = PREFIXES[task.name]
            report.metrics |= {f"{prefix}_{k}": value for k, value in result.metrics().items()}
            report.intervals |= {f"{prefix}_{k}": both for k, both in result.intervals().items()}
        else:
            report.metrics |= result.metrics()
            report.intervals |= result.intervals()
        if isinstance(result, ZeroShotResult):
            _add_predictions(task, result, report)
        elif isinstance(result, RetrievalResult):
            _add_pairs(task, result, report)

    def _encode(
        self, data: DataConfig, dataset: Dataset, task: Task, limit: int | None = None
    ) -> Encoded:
        key = key_of(data, dataset, limit)
        if key not in self.encoded:
            self.encoded[key] = encode_dataset(
                self.model,
                dataset,
                data,
                self.preprocess,
                batch_size=task.batch_size,
                limit=limit,
                label=f"evaluating {task.name}",
            )
        return self.encoded[key]

    def _zero_shot(self, task: Task, images: Encoded) -> ZeroShotResult | None:
        classes, templates = task.dataset.classes, task.dataset.templates
        classifier = build_classifier(
            self.model, classes, templates, batch_size=task.batch_size, shared=True
        )
        if rank_and_world_size()[0] > 0:
            return None
        return zero_shot(
            images,
            classifier,
            classes=classes,
            templates=templates,
            scale=self.model.logit_scale.exp().item(),
            device=self.device,
        )

    def _retrieval(self, task: Task, images: Encoded) -> RetrievalResult | None:
        captions = [caption for several in images.captions for caption in several]
        texts = encode_texts(self.model, captions, batch_size=task.batch_size, shared=True)
        if rank_and_world_size()[0] > 0:
            return None
        owners = [i for i, several in enumerate(images.captions) for _ in several]
        return retrieve(
            images.features,
            texts,
            torch.tensor(owners),
            captions=captions,
            indices=images.indices,
            device=self.device,
        )

    def _probe(self, task: Task, images: Encoded) -> ProbeResult | None:
        """A linear or k-NN probe; without a split to learn from, a half of each class is one."""
        train = self._labelled(task, task.train)
        validation = self._labelled(task, task.validation)
        if rank_and_world_size()[0] > 0:
            return None
        learned_from = f"split {task.train.data.split}" if task.train else ""
        if train is None:
            learn, rest = draw_per_class(images.labels, 0.5)
            train = self._placed(images.features[learn], images.labels[learn])
            images = images.chosen(rest)
            learned_from = "half of each class, tested on the other half"
        classes, count = task.dataset.classes, len(task.dataset.classes)
        if task.name == "linear_probe":
            fitted = linear_probe(train, validation, count, shots=task.shots)
            setting, learned = fitted.strength, fitted.learned
            scores = scores_of(fitted.linear, images.features)
        else:
            setting, learned = min(task.k, len(train.labels)), len(train.labels)
            scores = neighbour_votes(train, images.features, count, int(setting))
        if task.shots is not None:
            learned_from += f", {task.shots} image{'' if task.shots == 1 else 's'} per class"
        said = classify(
            scores,
            images.labels,
            classes=classes,
            indices=images.indices,
            features=images.features,
        )
        return ProbeResult(
            **vars(said), learned_from=learned_from, learned=learned, setting=setting
        )

    def _labelled(self, task: Task, part: Part | None) -> Labelled | None:
        if part is None:
            return None
        found = self._encode(part.data, part.dataset, task)
        return self._placed(found.features, found.labels)

    def _placed(self, features: torch.Tensor, labels: torch.Tensor) -> Labelled:
        return Labelled(features.to(self.device), labels.to(self.device))


def key_of(data: DataConfig, dataset: Dataset, limit: int | None) -> str:
    """Names what is encoded: the same for tasks that read the same images."""
    return f"{data.model_dump_json(exclude={'templates'})} {limit} {bool(dataset.classes)}"


def _add_retention(report: Report, own: Report, baseline: Mapping[str, float]) -> None:
    if rank_and_world_size()[0] > 0:
        return
    report.metrics |= {PREFIX + name: value for name, value in own.metrics.items()}
    report.intervals |= {PREFIX + name: both for name, both in own.intervals.items()}
    report.results |= {PREFIX + name: result for name, result in own.results.items()}
    report.tasks |= {PREFIX + name: task for name, task in own.tasks.items()}
    report.data |= {PREFIX + name: facts for name, facts in own.data.items()}
    report.bad |= own.bad
    report.baseline = dict(baseline)


def _add_predictions(task: Task, result: ZeroShotResult, report: Report) -> None:
    """Add images with predictions, and examples unless there are some, to the report."""
    classes = result.classes
    labels: list[int] = result.labels.tolist()
    indices: list[int] = result.indices.tolist()
    said: list[int] = result.top_classes[:, 0].tolist()
    in_order: list[int] = result.indices.argsort().tolist()
    report.predictions = [
        (task.image(indices[i]), classes[said[i]], classes[labels[i]])
        for i in in_order[:: -(-len(labels) // PREDICTIONS)]
    ]
    if not report.examples:
        firsts = {labels[row]: row for row in reversed(in_order)}
        rows = [firsts[label] for label in sorted(firsts)[:EXAMPLES]]
        report.examples = [
            (task.image(indices[i]), fill(result.templates[:1], classes[labels[i]])[0])
            for i in rows
        ]
        shown_classes = result.classifier[[labels[i] for i in rows]]
        report.similarity = shown_classes @ result.features[rows].T


def _add_pairs(task: Task, result: RetrievalResult, report: Report) -> None:
    """Add pairs of image and caption with their similarities to the report."""
    rows: list[int] = result.indices.argsort()[:EXAMPLES].tolist()
    firsts = [int((result.owners == row).nonzero()[0, 0]) for row in rows]
    report.examples = [
        (task.image(int(result.indices[row])), result.captions[first])
        for row, first in zip(rows, firsts, strict=True)
    ]
    report.similarity = result.text_features[firsts] @ result.features[rows].T


def _data_facts(task: Task, images: Encoded) -> dict[str, Any]:
    data = task.data
    return {
        "format": data.format,
        "root": data.root,
        "split": split_in_use(data),
        "samples": len(images.indices),
        "limit": task.limit,
        "available": images.available,
        "sha256": images.fingerprint(task.dataset.classes),
    }
