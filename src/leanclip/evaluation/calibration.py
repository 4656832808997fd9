"""Calibration: probabilities that mean what they say, sets of classes, and "none of these".

logits and labels of images that training has not seen -> Calibration -> calibration.json
-> logits of new images -> probabilities, sets that hold the right class, or none of the classes

Logits are what the model's forward pass gives: exp(logit_scale) times the cosine of image and
class. Images are never trained on here; only three numbers are chosen.

Shapes: N images, C classes.
"""

import json
import math
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Annotated

import torch
from pydantic import Field
from torch.nn import functional as F

from leanclip.config.sections import Section, parse, to_plain
from leanclip.errors import ConfigError, DataError
from leanclip.io.files import LFS_POINTER, is_lfs_file
from leanclip.model import CLIP
from leanclip.weights import fingerprint

FILE = "calibration.json"
TEMPERATURES = (0.05, 20.0)  # where the data asks for more, there are too few mistakes in it
SEED = 0  # of which images the temperature is fitted on


class Calibration(Section):
    """Three numbers that were fitted to one classifier: these weights, classes and templates.

    What holds, for new images drawn as the calibration images were (exchangeable with them), on
    average over such draws, whatever the model:

    - the set has the right class for a share of at least `coverage` of them;
    - at most 1 - `coverage` of them are called none of the classes.

    It does not hold class by class, nor for other kinds of images. Nothing is promised of
    foreign images: how many are called none depends on how foreign they look to the model.
    """

    temperature: Annotated[float, Field(gt=0)]  # probabilities are softmax(logits / temperature)
    threshold: float  # the probability from which on a class is in the set
    floor: float  # of the highest logit: below it, it is none of the classes
    coverage: Annotated[float, Field(gt=0, lt=1)]
    images: int  # that threshold and floor are from
    weights: str  # SHA-256 of the model's tensors
    classes: tuple[str, ...]
    templates: tuple[str, ...]

    def probabilities(self, logits: torch.Tensor) -> torch.Tensor:
        """Probabilities of the classes, (N, C) float32, of logits (N, C)."""
        return F.softmax(logits.float() / self.temperature, dim=-1)

    def prediction_sets(self, logits: torch.Tensor) -> torch.Tensor:
        """Which classes each image may be of, (N, C) bool, of logits (N, C).

        The most probable class is always among them, so that no set is empty.
        """
        found = self.probabilities(logits)
        best = found == found.amax(dim=-1, keepdim=True)
        return (found >= self.threshold) | best

    def is_none(self, logits: torch.Tensor) -> torch.Tensor:
        """Which images look like none of the classes, (N,) bool, of logits (N, C)."""
        return logits.float().amax(dim=-1) < self.floor

    def check(self, model: CLIP, classes: Sequence[str], templates: Sequence[str]) -> None:
        """See that this was fitted to the same weights, classes and templates.

        Raises:
            ConfigError: it was not; says what differs.
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
        """Read `calibration.json`, or the folder that it lies in.

        Raises:
            ConfigError: there is none, or it is not one.
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
        names = cls.model_fields.keys()
        if not isinstance(values, dict) or values.keys() != names:
            raise ConfigError(f"{path}: is no calibration.json; it has to hold {', '.join(names)}")
        return parse(cls, values, where=str(path))


def fit(
    logits: torch.Tensor,
    labels: torch.Tensor,
    *,
    coverage: float,
    weights: str,
    classes: Sequence[str],
    templates: Sequence[str],
) -> Calibration:
    """Calibrate on logits (N, C) and labels (N,): a random half each for the two parts.

    Temperature from one half; threshold and floor from the other, so that they are quantiles of
    scores that were settled before these images were looked at.

    The sets are those of split conformal prediction with the score 1 - probability of the right
    class (LAC: arXiv 1609.00451; the quantile as in arXiv 2107.07511, section 1). Of all rules
    with one coverage it gives the smallest sets on average, where the probabilities are right;
    adaptive sets (APS) would spread the coverage more evenly over easy and hard images, for
    larger sets. The coverage does not depend on the probabilities being right.

    The floor is the conformal quantile of the images' highest logits, whatever their class. It
    is higher than the quantile of the right class's logits, and so finds more foreign images
    for the same share of wrongly refused ones.

    Raises:
        ConfigError: `coverage` is not between 0 and 1.
        DataError: too few images for it, or scores that are no numbers.
    """
    if not logits.isfinite().all():
        raise DataError("calibration: the model gives scores that are no numbers; it is broken")
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
    lowest = len(second) + 1 - rank  # which one from the lowest
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
    """The T with the least negative log-likelihood of softmax(logits / T), within TEMPERATURES.

    One mistake is added to what the images show: an average image whose class is the runner-up.
    Without it a few images that are all right would ask for T = 0, certainty, as Platt's
    smoothed targets avoid it in two classes. The likelihood is convex in 1 / T: its derivative
    is bisected (temperature scaling: arXiv 1706.04599, section 4.2).
    """
    logits = logits.double()
    right = logits.gather(1, labels[:, None])[:, 0].mean()
    second = logits.topk(min(2, logits.shape[1]), dim=1).values[:, -1].mean()
    wanted = (len(labels) * right + second) / (len(labels) + 1)
    low, high = (math.log(1 / bound) for bound in reversed(TEMPERATURES))  # of 1 / T
    for _ in range(40):
        middle = (low + high) / 2
        chances = F.softmax(math.exp(middle) * logits, dim=1)
        if (chances * logits).sum(dim=1).mean() > wanted:  # too sure
            high = middle
        else:
            low = middle
    return math.exp(-(low + high) / 2)
