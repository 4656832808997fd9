"""Zero-shot classification: a classifier made of class names, and what it says of images.

Shapes: N images, C classes, T templates, E embedding.
"""

import hashlib
import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.nn import functional as F

from leanclip.data.dataset import fill
from leanclip.distributed.collectives import all_gather_object, rank_and_world_size
from leanclip.evaluation.classification import Classification, classify
from leanclip.evaluation.features import Encoded, encode_texts
from leanclip.io.download import cache_folder
from leanclip.io.files import atomic_write, last_use
from leanclip.model import CLIP
from leanclip.weights import fingerprint

log = logging.getLogger("leanclip")

KEPT = 100  # classifiers in the cache; one of 1,000 classes takes 2 MB
_VERSION = 1  # of what is kept; part of its name
_BLOCK = 1 << 22  # scores at a time


@dataclass(frozen=True)
class ZeroShotResult(Classification):
    """What the prompts' classifier said of each image."""

    templates: Sequence[str]
    classifier: torch.Tensor  # (C, E), of unit length
    scale: float  # probabilities are softmax(scale * cosine)


def build_classifier(
    model: CLIP,
    classes: Sequence[str],
    templates: Sequence[str],
    *,
    batch_size: int = 256,
    shared: bool = False,
    truncate: bool = True,
    packed: bool = False,
) -> torch.Tensor:
    """One unit vector per class, (C, E): the mean over templates of unit text features.

    As in OpenAI's Prompt_Engineering_for_ImageNet notebook: normalise, average, normalise.
    For `shared`, `truncate` and `packed` see `encode_texts`.

    Raises:
        DataError: a prompt is over the context, and `truncate` does not have it cut.
    """
    prompts = [prompt for name in classes for prompt in fill(templates, name)]
    features = encode_texts(
        model,
        prompts,
        batch_size=batch_size,
        shared=shared,
        truncate=truncate,
        packed=packed,
    )  # (C * T, E)
    return F.normalize(features.view(len(classes), len(templates), -1).mean(dim=1), dim=-1)


def cached_classifier(
    model: CLIP,
    classes: Sequence[str],
    templates: Sequence[str],
    *,
    weights: str,
    batch_size: int = 256,
    shared: bool = False,
) -> torch.Tensor:
    """`build_classifier`, or what it gave for the same weights, templates and classes before.

    Kept in the cache folder's `classifiers`, the KEPT last used; a file that is not what was
    written is made anew.

    Args:
        model: in evaluation mode.
        classes: names, by label.
        templates: with `{}` for the name.
        weights: `leanclip.weights.fingerprint` of the model's state.
        batch_size: prompts of a forward pass.
        shared: as of `build_classifier`; the first rank's cache counts.
    """
    device = model.logit_scale.device.type
    words = [_VERSION, weights, device, list(templates), list(classes)]
    key = hashlib.sha256(json.dumps(words).encode()).hexdigest()
    path = cache_folder() / "classifiers" / f"{key[:32]}.safetensors"
    is_first = not shared or rank_and_world_size()[0] == 0
    kept = _read(path, key) if is_first else None
    if shared:
        kept = next(iter(all_gather_object(kept)), None)
    if kept is None:
        kept = build_classifier(model, classes, templates, batch_size=batch_size, shared=shared)
        if is_first:
            _keep(path, key, kept)
    return kept


def _read(path: Path, key: str) -> torch.Tensor | None:
    """A classifier that was kept, if it is there and what was written."""
    try:
        with safe_open(path, "pt") as file:
            facts, found = file.metadata() or {}, file.get_tensor("classifier")
    except (OSError, SafetensorError):
        return None
    if facts.get("key") != key or facts.get("sha256") != fingerprint({"classifier": found}):
        return None
    path.touch()
    return found


def _keep(path: Path, key: str, classifier: torch.Tensor) -> None:
    """Write a classifier whole or not at all; a folder that cannot be written is no reason to stop.

    Of the files that are there the KEPT last used stay.
    """
    tensors = {"classifier": classifier.contiguous()}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path, by_several=True) as part:
            save_file(tensors, part, {"key": key, "sha256": fingerprint(tensors)})
        by_age = sorted(
            path.parent.glob("*.safetensors"), key=lambda one: last_use(one.stat().st_mtime)
        )
        for old in by_age[:-KEPT]:
            old.unlink(missing_ok=True)
    except (OSError, SafetensorError) as error:
        log.warning("%s: the classifier cannot be kept: %s", path, error)


def zero_shot(
    images: Encoded,
    classifier: torch.Tensor,
    *,
    classes: Sequence[str],
    templates: Sequence[str],
    scale: float,
    device: torch.device | str = "cpu",
) -> ZeroShotResult:
    """Classify encoded images; `scale` is exp(logit_scale)."""
    weights = classifier.to(device)
    rows = max(1, _BLOCK // len(classes))
    scores = (part.to(device) @ weights.T * scale for part in images.features.split(rows))
    said = classify(
        scores, images.labels, classes=classes, indices=images.indices, features=images.features
    )
    return ZeroShotResult(**vars(said), templates=templates, classifier=classifier, scale=scale)
