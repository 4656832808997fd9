"""Calibrate a zero-shot classifier on images that are held out, and measure it on the others.

    report with a classifier, held-out images -> Calibration -> metrics before and after -> report

Shapes: N images, C classes.
"""

from collections.abc import Mapping

import numpy as np
import torch

from leanclip.config.schema import Config
from leanclip.distributed.collectives import rank_and_world_size
from leanclip.errors import ConfigError, DataError
from leanclip.evaluation.calibration import SEED, Calibration, fit
from leanclip.evaluation.classification import calibration_error
from leanclip.evaluation.features import encode_dataset
from leanclip.evaluation.intervals import bootstrap
from leanclip.evaluation.results import Report
from leanclip.evaluation.tasks import ORDER, Task, check_classes, open_tasks
from leanclip.evaluation.zero_shot import ZeroShotResult
from leanclip.model import CLIP
from leanclip.preprocess.images import Preprocess

_OPTION = "--calibrate"


def open_held_out(config: Config, tasks: Mapping[str, Task], words: str) -> Task | float:
    """What `--calibrate` names: a split of the zero-shot data, opened, or a share of its images.

    Raises:
        ConfigError: no zero-shot classification is measured, or this split is.
        DataError: there is no such split, or it is of other classes.
    """
    wanted = config.evaluate.zero_shot
    if wanted is None or "zero_shot" not in tasks:
        raise ConfigError(
            f"{_OPTION} {words}: goes with zero-shot classification, which is not measured; name "
            f"class data with --data"
        )
    try:
        share = float(words)
    except ValueError:
        measured = tasks["zero_shot"]
        chosen = wanted.model_copy(update={"split": words})
        only = dict.fromkeys(ORDER) | {"zero_shot": chosen}
        settings = config.evaluate.model_copy(update=only)
        held_out = open_tasks(config.model_copy(update={"evaluate": settings}))[0]
        if held_out.data.split == measured.data.split:
            raise ConfigError(
                f"{_OPTION} {words}: is the split that is measured; name another, or a share of "
                f"it to hold out, such as 0.5"
            ) from None
        check_classes(f"{_OPTION} {words}", measured, held_out.data, held_out.dataset)
        return held_out
    if not 0 < share < 1:
        raise ConfigError(f"{_OPTION} {words}: is no split and no share between 0 and 1")
    return share


def calibrate(
    model: CLIP,
    held_out: Task | float,
    preprocess: Preprocess,
    report: Report,
    *,
    coverage: float,
) -> None:
    """Calibrate on the held-out images and add what this changes to the report.

    Every rank calls this; the first one, which has the report, gets the calibration.

    Raises:
        DataError: too few images are held out.
    """
    images = None
    if isinstance(held_out, Task):
        images = encode_dataset(
            model,
            held_out.dataset,
            held_out.data,
            preprocess,
            batch_size=held_out.batch_size,
            limit=held_out.limit,
            label="calibrating",
        )
        report.bad |= images.bad
    if rank_and_world_size()[0] > 0:
        return
    result = report.results["zero_shot"]
    assert isinstance(result, ZeroShotResult)
    logits, labels = _logits(result, result.features), result.labels
    if images is not None:
        own_logits, own_labels = _logits(result, images.features), images.labels
        where = f"split {held_out.data.split}" if isinstance(held_out, Task) else ""
    else:
        assert isinstance(held_out, float)
        order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(SEED + 1))
        count = round(held_out * len(labels))
        if count == len(labels):
            raise DataError(f"{_OPTION} {held_out:g}: leaves no image of {count} to measure on")
        own_logits, own_labels = logits[order[:count]], labels[order[:count]]
        logits, labels = logits[order[count:]], labels[order[count:]]
        where = f"{held_out:.0%} of the images"
    calibration = fit(
        own_logits,
        own_labels,
        coverage=coverage,
        weights=report.weights,
        classes=result.classes,
        templates=result.templates,
    )
    report.calibration = calibration
    report.calibrated_on = f"{where} ({len(own_labels):,} images)"
    _add_metrics(report, calibration, logits, labels)


def _logits(result: ZeroShotResult, features: torch.Tensor) -> torch.Tensor:
    return features @ result.classifier.T * result.scale  # (N, C)


def _add_metrics(
    report: Report, calibration: Calibration, logits: torch.Tensor, labels: torch.Tensor
) -> None:
    """Add metrics on images that were not held out."""

    def error(probabilities: torch.Tensor) -> float:
        highest, said = probabilities.max(dim=1)
        return calibration_error(highest, said == labels)

    sets = calibration.prediction_sets(logits)
    held = sets.gather(1, labels[:, None])[:, 0]
    none = calibration.is_none(logits)
    metrics = {
        "calibrated_ece_before": error(logits.softmax(dim=1)),
        "calibrated_ece": error(calibration.probabilities(logits)),
        "calibrated_coverage": held.double().mean().item(),
        "calibrated_set_size": sets.sum(dim=1).double().mean().item(),
        "calibrated_none": none.double().mean().item(),
    }
    report.metrics |= metrics
    shares = {"calibrated_coverage": held.numpy(), "calibrated_none": none.numpy()}

    def measure(drawn: np.ndarray) -> dict[str, np.ndarray]:
        return {name: right[drawn].mean(axis=1) for name, right in shares.items()}

    report.intervals |= bootstrap(len(labels), measure)
    report.calibration_test_images = len(labels)
