"""Calibration of a zero-shot classifier: probabilities, prediction sets, and "none of these".

    logits and labels of held-out images -> `fit` -> Calibration -> calibration.json
    logits of new images -> probabilities, sets that contain the right class, or no class

`calibrate` fits on held-out images and measures the effect on the others. Logits are
exp(logit_scale) times the cosine of image and class, without the bias that some models add to all
of them: calibrated probabilities are a softmax for every model, as one class is right. Only three
numbers are fitted.

Shapes: N images, C classes.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
from pydantic import Field
from torch.nn import functional as F

from leanclip.config.sections import Section, parse, to_plain
from leanclip.errors import ConfigError, DataError
from leanclip.evaluation.classification import calibration_error
from leanclip.evaluation.features import encode_dataset
from leanclip.evaluation.statistics import Interval, bootstrap
from leanclip.evaluation.tasks import Task, other_split
from leanclip.evaluation.zero_shot import ZeroShotResult
from leanclip.io.files import LFS_POINTER, is_lfs_file
from leanclip.model import CLIP
from leanclip.preprocess.images import Preprocess
from leanclip.weights import fingerprint

FILE = "calibration.json"
TEMPERATURES = (0.05, 20.0)  # outside these there are too few mistakes to fit one
SEED = 0  # of the images that the temperature is fitted on
_OPTION = "--calibrate"


class Calibration(Section):
    """Three numbers fitted to one classifier: these weights, classes and templates.

    For new images that are exchangeable with the calibration images, on average and for any model:

    - the set contains the right class for a fraction of at least `coverage`;
    - at most a fraction of 1 - `coverage` is rejected as none of the classes.

    Neither holds class by class, nor for other kinds of images. There is no guarantee for images
    of other classes: how many are rejected depends on the model.
    """

    temperature: Annotated[float, Field(gt=0)]  # probabilities are softmax(logits / temperature)
    threshold: float  # the lowest probability of a class in the set
    floor: float  # of the highest logit: an image below it is none of the classes
    coverage: Annotated[float, Field(gt=0, lt=1)]
    images: int  # that threshold and floor were fitted on
    weights: str  # SHA-256 of the model's tensors
    classes: tuple[str, ...]
    templates: tuple[str, ...]

    def probabilities(self, logits: torch.Tensor) -> torch.Tensor:
        """Probabilities of the classes, (N, C) float32, of logits (N, C)."""
        return F.softmax(logits.float() / self.temperature, dim=-1)

    def prediction_sets(self, logits: torch.Tensor) -> torch.Tensor:
        """The classes in each image's set, (N, C) bool, of logits (N, C).

        The most probable class is always included, so that no set is empty.
        """
        found = self.probabilities(logits)
        best = found == found.amax(dim=-1, keepdim=True)
        return (found >= self.threshold) | best

    def is_none(self, logits: torch.Tensor) -> torch.Tensor:
        """Whether each image is rejected as none of the classes, (N,) bool, of logits (N, C)."""
        return logits.float().amax(dim=-1) < self.floor

    def check(self, model: CLIP, classes: Sequence[str], templates: Sequence[str]) -> None:
        """Check that this was fitted to the same weights, classes and templates.

        Raises:
            ConfigError: it was not.
        """
        given = {
            "weights": fingerprint(model.state_dict()),
            "classes": tuple(classes),
            "templates": tuple(templates),
        }
        differing = [name for name, value in given.items() if getattr(self, name) != value]
        if differing:
            raise ConfigError(
                f"calibration: was fitted to other {' and '.join(differing)}; fit one to these "
                f"with: leanclip eval --calibrate"
            )

    def save(self, folder: Path) -> Path:
        """Write `calibration.json` into an existing folder."""
        path = folder / FILE
        path.write_text(json.dumps(to_plain(self), indent=1) + "\n", encoding="utf-8")
        return path

    @classmethod
    def load(cls, source: str | Path) -> "Calibration":
        """Read `calibration.json`, given its path or its folder.

        Raises:
            ConfigError: it is missing or invalid.
        """
        path = Path(source)
        path = path / FILE if path.is_dir() else path
        if is_lfs_file(path):
            raise ConfigError(f"{path}: {LFS_POINTER}")
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise ConfigError(
                f"calibration: no such file: {path} (make it with: leanclip eval --calibrate)"
            ) from None
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"{path}: is no calibration.json: {error}") from None
        if not isinstance(values, dict) or values.keys() != cls.model_fields.keys():
            names = ", ".join(cls.model_fields)
            raise ConfigError(f"{path}: is no calibration.json, which has the keys {names}")
        return parse(cls, values, where=str(path))


@dataclass(frozen=True)
class Calibrated:
    """A calibration, and the metrics on images that it was not fitted on."""

    calibration: Calibration
    held_out: str | float  # the split, or the fraction of the images, that it was fitted on
    images: int  # held out
    test_images: int  # that the metrics are of
    metrics: dict[str, float]
    intervals: dict[str, Interval]
    bad: dict[str, str]  # unreadable held-out images: id -> reason


def open_held_out(task: Task | None, words: str) -> Task | float:
    """The value of `--calibrate`: a split of the zero-shot data, opened, or a fraction of it.

    Raises:
        ConfigError: there is no zero-shot task, or this is its split.
        DataError: there is no such split, or it has other classes.
    """
    if task is None:
        raise ConfigError(
            f"{_OPTION} {words}: needs zero-shot classification, which is not evaluated; name "
            f"class data with --data"
        )
    try:
        fraction = float(words)
    except ValueError:
        if words == task.data.split:
            raise ConfigError(
                f"{_OPTION} {words}: is the split that is evaluated; name another, or a fraction "
                f"of it to hold out, such as 0.5"
            ) from None
        part = other_split(task, words, f"{_OPTION} {words}")
        return replace(task, data=part.data, dataset=part.dataset)
    if not 0 < fraction < 1:
        raise ConfigError(f"{_OPTION} {words}: neither a split nor a fraction between 0 and 1")
    return fraction


def calibrate(
    model: CLIP,
    held_out: Task | float,
    preprocess: Preprocess,
    result: ZeroShotResult | None,
    *,
    coverage: float,
    weights: str,
) -> Calibrated | None:
    """Fit a calibration on held-out images, and measure its effect on the others.

    Every rank calls this; the first one, which has the `result`, returns the calibration.
    `weights` is the fingerprint of the model.

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
    if result is None:
        return None
    logits, labels = _logits(result, result.features), result.labels
    if isinstance(held_out, Task):
        assert images is not None
        own_logits, own_labels = _logits(result, images.features), images.labels
    else:
        order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(SEED + 1))
        count = round(held_out * len(labels))
        if count == len(labels):
            raise DataError(f"{_OPTION} {held_out:g}: leaves no image of {count} to evaluate on")
        own_logits, own_labels = logits[order[:count]], labels[order[:count]]
        logits, labels = logits[order[count:]], labels[order[count:]]
    calibration = fit(
        own_logits,
        own_labels,
        coverage=coverage,
        weights=weights,
        classes=result.classes,
        templates=result.templates,
    )
    return Calibrated(
        calibration,
        (held_out.data.split or "") if isinstance(held_out, Task) else held_out,
        len(own_labels),
        len(labels),
        *_metrics(calibration, logits, labels, result.bias),
        images.bad if images else {},
    )


def _logits(result: ZeroShotResult, features: torch.Tensor) -> torch.Tensor:
    return features @ result.classifier.T * result.scale  # (N, C)


def _metrics(
    calibration: Calibration, logits: torch.Tensor, labels: torch.Tensor, bias: float | None
) -> tuple[dict[str, float], dict[str, Interval]]:
    def error(probabilities: torch.Tensor) -> float:
        highest, predicted = probabilities.max(dim=1)
        return calibration_error(highest, predicted == labels)

    before = logits.softmax(dim=1) if bias is None else (logits + bias).sigmoid()
    sets = calibration.prediction_sets(logits)
    fractions = {
        "calibrated_coverage": sets.gather(1, labels[:, None])[:, 0].numpy(),
        "calibrated_none": calibration.is_none(logits).numpy(),
    }
    metrics = {
        "calibrated_ece_before": error(before),
        "calibrated_ece": error(calibration.probabilities(logits)),
        "calibrated_coverage": float(fractions["calibrated_coverage"].mean()),
        "calibrated_set_size": sets.sum(dim=1).double().mean().item(),
        "calibrated_none": float(fractions["calibrated_none"].mean()),
    }

    def measure(drawn: np.ndarray) -> dict[str, np.ndarray]:
        return {name: is_one[drawn].mean(axis=1) for name, is_one in fractions.items()}

    return metrics, bootstrap(len(labels), measure)


def fit(
    logits: torch.Tensor,
    labels: torch.Tensor,
    *,
    coverage: float,
    weights: str,
    classes: Sequence[str],
    templates: Sequence[str],
) -> Calibration:
    """Calibrate on logits (N, C) and labels (N,).

    A random half gives the temperature, the other half threshold and floor, which are therefore
    quantiles of scores that do not depend on the images they are computed from.

    The sets are those of split conformal prediction with the score 1 - probability of the right
    class (LAC: arXiv 1609.00451; the quantile as in arXiv 2107.07511, section 1). If the
    probabilities are right, no rule of the same coverage has smaller sets on average; adaptive
    sets (APS) would spread the coverage more evenly over easy and hard images, with larger sets.
    The coverage does not depend on the probabilities being right.

    The floor is the conformal quantile of the images' highest logits, whatever their class. It
    is higher than the quantile of the right class's logits, and so rejects more images of other
    classes for the same fraction of wrongly rejected ones.

    Raises:
        ConfigError: `coverage` is not between 0 and 1.
        DataError: too few images for it, or logits that are not finite.
    """
    if not logits.isfinite().all():
        raise DataError("calibration: the model's logits are not finite; it is broken")
    if not 0 < coverage < 1:
        raise ConfigError(f"coverage: {coverage:g} is not between 0 and 1; for example 0.9")
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(SEED))
    first, second = order[: len(order) // 2], order[len(order) // 2 :]
    rank = math.ceil(Fraction(str(coverage)) * (len(second) + 1))
    if rank > len(second):
        needed = 2 * math.ceil(Fraction(str(coverage)) / (1 - Fraction(str(coverage)))) - 1
        raise DataError(
            f"calibration: {len(labels)} images are too few for a coverage of {coverage:g}, "
            f"which needs {needed}; lower the coverage or give more images"
        )
    temperature = fit_temperature(logits[first], labels[first])
    probabilities = F.softmax(logits[second].float() / temperature, dim=1)
    right = probabilities.gather(1, labels[second, None])[:, 0]
    best = logits[second].float().amax(dim=1)
    lowest = len(second) + 1 - rank  # counted from the lowest
    return Calibration(
        temperature=temperature,
        threshold=right.kthvalue(lowest).values.item(),
        floor=best.kthvalue(lowest).values.item(),
        coverage=coverage,
        images=len(second),
        weights=weights,
        classes=tuple(classes),
        templates=tuple(templates),
    )


def fit_temperature(logits: torch.Tensor, labels: torch.Tensor) -> float:
    """The T within TEMPERATURES that minimises the cross-entropy of softmax(logits / T).

    One mistake is added: an average image whose class is the runner-up. Without it T would be 0
    for a few images that are all correct; Platt's smoothed targets do the same for two classes.
    The likelihood is convex in 1 / T, and its derivative is bisected (temperature scaling: arXiv
    1706.04599, section 4.2).
    """
    logits = logits.double()
    right = logits.gather(1, labels[:, None])[:, 0].mean()
    second = logits.topk(min(2, logits.shape[1]), dim=1).values[:, -1].mean()
    wanted = (len(labels) * right + second) / (len(labels) + 1)
    low, high = (math.log(1 / bound) for bound in reversed(TEMPERATURES))  # of 1 / T
    for _ in range(40):
        middle = (low + high) / 2
        chances = F.softmax(math.exp(middle) * logits, dim=1)
        if (chances * logits).sum(dim=1).mean() > wanted:  # overconfident
            high = middle
        else:
            low = middle
    return math.exp(-(low + high) / 2)
