"""Several models on the same data, whose images are decoded once."""

from collections.abc import Collection, Sequence

from leanclip.evaluate.features import encode_each
from leanclip.evaluate.report import Report, evaluate, measure
from leanclip.evaluate.tasks import Task
from leanclip.images import Preprocess
from leanclip.model import CLIP
from leanclip.weights import fingerprint


def evaluate_each(
    models: Collection[tuple[CLIP, Preprocess]], tasks: Sequence[Task]
) -> list[Report]:
    """A report for each model, with the figures that `evaluate` gives.

    Where their resolutions differ, each model decodes the images anew.

    Args:
        models: in evaluation mode; gone through again and again, so that one model may take the
            weights of each in turn.
        tasks: to measure.

    Raises:
        DataError: more than the allowed share of a data set is unreadable.
    """
    if len({preprocess.resolution for _, preprocess in models}) > 1:
        return [evaluate(model, tasks, preprocess) for model, preprocess in models]
    reports = [Report(weights=fingerprint(model.state_dict())) for model, _ in models]
    for task in tasks:
        encoded = encode_each(
            models,
            task.dataset,
            task.data,
            batch_size=task.batch_size,
            limit=task.limit,
            label=f"evaluating {task.name}",
        )
        for (model, _), images, report in zip(models, encoded, reports, strict=True):
            measure(model, task, images, report)
    return reports
