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
from leanclip.data.splits import training_split
from leanclip.distributed.collectives import (
    all_gather_object,
    broadcast_buffers,
    rank_and_world_size,
)
from leanclip.evaluation.classification import chosen_probabilities, classify
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
from leanclip.evaluation.retrieval import RetrievalResult, retrieve
from leanclip.evaluation.tasks import RETENTION, Part, Task
from leanclip.evaluation.zero_shot import ZeroShotResult, build_classifier, zero_shot
from leanclip.model import CLIP
from leanclip.model.lora import merged_state
from leanclip.preprocess.images import Preprocess
from leanclip.weights import fingerprint

METRIC_PREFIXES = {"zero_shot": "zeroshot_", "retrieval": ""}  # of others the task and "_"


def evaluate(
    model: CLIP,
    tasks: Sequence[Task],
    preprocess: Preprocess,
    *,
    retention: Task | None = None,
    baseline: Mapping[str, float] | None = None,
) -> Report:
    """Evaluate a model; the metrics of the retention benchmark begin with `retention/`.

    Args:
        model: the same on every rank, but the statistics of BatchNorms, which are the first's.
        tasks: what to evaluate, on which data.
        preprocess: of the model.
        retention: the task that fine-tuning should not forget.
        baseline: the metrics before fine-tuning.

    Raises:
        DataError: more than the allowed fraction of a data set is unreadable.
    """
    report = Report()
    with _eval_mode(model):
        broadcast_buffers(model)
        report.weights = fingerprint(merged_state(model))
        evaluator = _Evaluator(model, preprocess, report)
        for task in tasks:
            evaluator.add(task)
        if retention is not None:
            evaluator.add(retention, RETENTION)
            report.baseline = dict(baseline or {})
    report.metrics = all_gather_object(report.metrics)[0]
    return report


def metric_prefix(task: str) -> str:
    """What the names of a task's metrics begin with."""
    return METRIC_PREFIXES.get(task, f"{task}_")


@contextmanager
def _eval_mode(model: CLIP) -> Iterator[None]:
    """As `model.eval()`; a locked tower in eval mode stays in it when training goes on."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


class _Evaluator:
    """Adds tasks to a report; images that several tasks use are encoded once."""

    def __init__(self, model: CLIP, preprocess: Preprocess, report: Report) -> None:
        self.model, self.preprocess, self.report = model, preprocess, report
        self.device = model.logit_scale.device
        self.is_first = rank_and_world_size()[0] == 0
        self._encoded: dict[str, Encoded] = {}

    def add(self, task: Task, prefix: str = "") -> None:
        """Evaluate a task: all ranks encode, the first one computes the metrics."""
        images = self._encode(task.data, task.dataset, task, task.limit)
        result: Result | None
        if task.name == "zero_shot":
            result = self._zero_shot(task, images)
        elif task.name == "retrieval":
            result = self._retrieval(task, images)
        else:
            result = self._probe(task, images)
        report, name = self.report, prefix + task.name
        report.bad |= images.bad
        if result is None:
            return
        report.results[name], report.tasks[name] = result, task
        report.data[name] = _data_facts(task, images)
        prefix += metric_prefix(task.name)
        report.metrics |= {f"{prefix}{k}": value for k, value in result.metrics().items()}
        report.intervals |= {f"{prefix}{k}": ends for k, ends in result.intervals().items()}

    def _encode(
        self, data: DataConfig, dataset: Dataset, task: Task, limit: int | None = None
    ) -> Encoded:
        key = f"{data.model_dump_json(exclude={'templates'})} {limit} {bool(dataset.classes)}"
        if key not in self._encoded:
            self._encoded[key] = encode_dataset(
                self.model,
                dataset,
                data,
                self.preprocess,
                batch_size=task.batch_size,
                limit=limit,
                label=f"evaluating {task.name}",
            )
        return self._encoded[key]

    def _zero_shot(self, task: Task, images: Encoded) -> ZeroShotResult | None:
        classes, templates = task.dataset.classes, task.dataset.templates
        bias = None if self.model.logit_bias is None else self.model.logit_bias.item()
        is_sigmoid = chosen_probabilities(task.probabilities, bias) == "sigmoid"
        classifier = build_classifier(
            self.model, classes, templates, batch_size=task.batch_size, shared=True
        )
        if not self.is_first:
            return None
        return zero_shot(
            images,
            classifier,
            classes=classes,
            templates=templates,
            scale=self.model.logit_scale.exp().item(),
            bias=bias if is_sigmoid else None,
            device=self.device,
        )

    def _retrieval(self, task: Task, images: Encoded) -> RetrievalResult | None:
        captions = [caption for captions in images.captions for caption in captions]
        texts = encode_texts(self.model, captions, batch_size=task.batch_size, shared=True)
        if not self.is_first:
            return None
        owners = [i for i, captions in enumerate(images.captions) for _ in captions]
        return retrieve(
            images.features,
            texts,
            torch.tensor(owners),
            captions=captions,
            indices=images.indices,
            device=self.device,
        )

    def _probe(self, task: Task, images: Encoded) -> ProbeResult | None:
        """A linear or k-NN probe; without a training split, half of each class is one."""
        train = self._labelled(task, task.train)
        validation = self._labelled(task, task.validation)
        if not self.is_first:
            return None
        if train is None:
            learn, rest = draw_per_class(images.labels, 0.5)
            train = self._on_device(images.features[learn], images.labels[learn])
            images = images.chosen(rest)
        classes, count = task.dataset.classes, len(task.dataset.classes)
        if task.name == "linear_probe":
            probe = linear_probe(train, validation, count, shots=task.shots)
            setting, learned = probe.strength, probe.learned
            scores = scores_of(probe.linear, images.features)
        else:
            setting, learned = min(task.k, len(train.labels)), len(train.labels)
            scores = neighbour_votes(train, images.features, count, int(setting))
        result = classify(
            scores,
            images.labels,
            classes=classes,
            indices=images.indices,
            features=images.features,
        )
        return ProbeResult(**vars(result), learned=learned, setting=setting)

    def _labelled(self, task: Task, part: Part | None) -> Labelled | None:
        if part is None:
            return None
        images = self._encode(part.data, part.dataset, task)
        return self._on_device(images.features, images.labels)

    def _on_device(self, features: torch.Tensor, labels: torch.Tensor) -> Labelled:
        return Labelled(features.to(self.device), labels.to(self.device))


def _data_facts(task: Task, images: Encoded) -> dict[str, Any]:
    data = task.data
    return {
        "format": data.format,
        "root": data.root,
        "split": training_split(data),
        "samples": len(images.indices),
        "limit": task.limit,
        "available": images.available,
        "sha256": images.fingerprint(task.dataset.classes),
    }
