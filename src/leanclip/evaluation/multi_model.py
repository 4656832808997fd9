"""Several models on the same data, whose images are decoded once."""

from collections.abc import Collection, Sequence
from dataclasses import replace

from leanclip.evaluation.evaluator import Evaluator, evaluate, key_of
from leanclip.evaluation.features import encode_each
from leanclip.evaluation.results import Report
from leanclip.evaluation.tasks import Task
from leanclip.model import CLIP
from leanclip.preprocess.images import CLIP_MEAN, CLIP_STD, Preprocess
from leanclip.weights import fingerprint


def evaluate_each(
    models: Collection[tuple[CLIP, Preprocess]], tasks: Sequence[Task]
) -> list[Report]:
    """A report for each model, with the metrics that `evaluate` gives.

    Where they resize or crop images differently, each model decodes the images anew.

    Args:
        models: in evaluation mode; gone through again and again, so that one model may take the
            weights of each in turn.
        tasks: to measure.

    Raises:
        DataError: more than the allowed share of a data set is unreadable.
    """
    if len({replace(one, mean=CLIP_MEAN, std=CLIP_STD) for _, one in models}) > 1:
        return [evaluate(model, tasks, preprocess) for model, preprocess in models]
    reports = [Report(weights=fingerprint(model.state_dict())) for model, _ in models]
    measuring = [Evaluator(model, preprocess) for model, preprocess in models]
    for task in tasks:
        _encode(models, task, measuring)
        for _, one, report in zip(models, measuring, reports, strict=True):  # their turns
            one.add(task, report)
    return reports


def _encode(
    models: Collection[tuple[CLIP, Preprocess]], task: Task, measuring: Sequence[Evaluator]
) -> None:
    """Give each model what it would encode for the task."""
    parts = [(task.data, task.dataset, task.limit)]
    parts += [(part.data, part.dataset, None) for part in (task.train, task.validation) if part]
    for data, dataset, limit in parts:
        key = key_of(data, dataset, limit)
        if key in measuring[0].encoded:
            continue
        label = f"evaluating {task.name}"
        found = encode_each(
            models, dataset, data, batch_size=task.batch_size, limit=limit, label=label
        )
        for one, images in zip(measuring, found, strict=True):
            one.encoded[key] = images
