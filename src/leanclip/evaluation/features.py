"""Unit features of images and texts, in batches, without gradients, over all ranks.

    a data set -> distinct images -> this rank's batches -> features -> all ranks', by digest
    texts -> the distinct ones, by length -> batches of one length, without padding -> features

A batch holds the same samples for any number of ranks, so that the features are the same.

Shapes: N images, M texts, E embedding, B batch, L tokens.
"""

import hashlib
import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch.nn import functional as F

from leanclip.config.data import DataConfig
from leanclip.data import Dataset
from leanclip.data.loader import evaluation_batches
from leanclip.data.skipped import Bad, SkipTracker, short_id
from leanclip.distributed.collectives import all_gather_object, gather_rows, rank_and_world_size
from leanclip.errors import ConfigError, DataError, SampleError
from leanclip.evaluation.distinct import DistinctImages, distinct_images
from leanclip.io.progress import ProgressBar
from leanclip.model import CLIP
from leanclip.preprocess.images import Preprocess, normalize
from leanclip.preprocess.text import Tokenizer

log = logging.getLogger("leanclip")

_TEXTS = 4096  # tokenised at a time
_CPU_IMAGES = 32  # a CPU is no faster with more, however small the model
_MAX_KEPT = 32 << 20  # bytes: glibc's malloc returns larger tensors to the system
_NAMED: WeakKeyDictionary[Dataset, set[str]] = WeakKeyDictionary()  # ids already logged


@dataclass(frozen=True)
class Encoded:
    """The readable images of a data set, ordered by digest."""

    features: torch.Tensor  # (N, E) float32, of unit length
    indices: torch.Tensor  # (N,) int64, in the data set; the first of several rows
    labels: torch.Tensor  # (N,) int64, of class data; -1 elsewhere
    captions: list[Sequence[str]]  # N, of captioned data
    digests: torch.Tensor  # (N,) int64, of image files and their captions or labels
    bad: dict[str, str]  # unreadable images: id -> reason
    available: int  # images of the data set, of which these may be a sample

    def chosen(self, rows: torch.Tensor) -> "Encoded":
        """Some of the images of class data."""
        names = ("features", "indices", "labels", "digests")
        return replace(self, **{name: getattr(self, name)[rows] for name in names})

    def fingerprint(self, classes: Sequence[str] = ()) -> str:
        """SHA-256 over the images' digests, in ascending order, and the class names.

        An image's digest is the 8-byte BLAKE2b of its file and its label or captions, so that the
        fingerprint does not depend on the data's place, order and format.
        """
        found = hashlib.sha256(self.digests.numpy().astype("<i8").tobytes())
        found.update(json.dumps(list(classes)).encode())
        return found.hexdigest()


def encode_dataset(
    model: CLIP,
    dataset: Dataset,
    data: DataConfig,
    preprocess: Preprocess,
    *,
    batch_size: int,
    limit: int | None = None,
    label: str = "encoding",
) -> Encoded:
    """Features of every readable image; every rank calls this, encodes its part, and gets all.

    Args:
        model: in eval mode; the same on every rank.
        dataset: the one that `data` describes.
        data: workers and limits.
        preprocess: of the model.
        batch_size: the most images of a forward pass; a CPU splits it further.
        limit: the size of a sample, the same for every model; see `distinct_images`.
        label: of the progress bar.

    Raises:
        DataError: all images are unreadable, or more than the allowed fraction.
    """
    images, distinct = dataset, None
    if limit is not None or not dataset.classes:  # class data is evaluated row by row
        images = distinct = distinct_images(dataset, limit, workers=data.workers)
    tracker = SkipTracker(distinct.names if distinct else len(dataset), data.max_bad_fraction)
    features, numbers, captions, bad = _encode_part(
        model, images, data, preprocess, batch_size, tracker, label
    )
    features, numbers = gather_rows(features)[0], gather_rows(numbers)[0]
    captions = [one for part in all_gather_object(captions) for one in part]
    bad = sorted(one for part in all_gather_object(bad) for one in part)
    tracker.add(bad)  # raises if a rank has stopped early
    if distinct:
        bad = _bad_rows(distinct, numbers[:, 0], bad)
    tracker.add(bad)
    _log_bad(dataset, bad)
    if not len(numbers):
        raise DataError(f"{data.root}: none of the images is readable")
    order = torch.from_numpy(np.lexsort(numbers[:, [0, 2]].T.numpy()))
    indices, labels, digests = numbers[order].unbind(dim=1)
    return Encoded(
        features[order],
        torch.from_numpy(distinct.first_rows)[indices] if distinct else indices,
        labels,
        [captions[i] for i in order.tolist()] if captions else [],
        digests,
        {one.id: one.reason for one in bad},
        distinct.available if distinct else len(dataset),
    )


def _encode_part(
    model: CLIP,
    images: Dataset,
    data: DataConfig,
    preprocess: Preprocess,
    batch_size: int,
    tracker: SkipTracker,
    label: str,
) -> tuple[torch.Tensor, torch.Tensor, list[Sequence[str]], list[Bad]]:
    """This rank's features (n, E); index, label and digest (n, 3); captions; unreadable images."""
    rank, world_size = rank_and_world_size()
    features, numbers = [torch.empty(0, model.config.embed_dim)], [torch.empty(0, 3).long()]
    captions: list[Sequence[str]] = []
    bad: list[Bad] = []
    batches = evaluation_batches(
        images,
        data,
        preprocess=preprocess,
        tokenizer=model.tokenizer,
        batch_size=batch_size,
        rank=rank,
        world_size=world_size,
    )
    with ProgressBar(label, len(images), is_silent=rank > 0) as bar:
        done = 0
        for batch in batches:
            bad += batch.bad
            if tracker.is_over(len(bad)):  # raised by the caller, over all ranks
                break
            if len(batch):
                features.append(encode_images(model, batch.images, preprocess))
                numbers.append(torch.stack([batch.indices, batch.labels, batch.digests], dim=1))
                captions += [] if images.classes else batch.captions
            done += len(batch) + len(batch.bad)
            bar.update(min(done * world_size, len(images)))
    return torch.cat(features), torch.cat(numbers), captions, bad


def _bad_rows(images: DistinctImages, good: torch.Tensor, bad: Sequence[Bad]) -> list[Bad]:
    """Every sample that shows an unreadable image; `good` are the indices of the others."""
    found = {one.id: one for one in bad}
    for index in np.setdiff1d(np.arange(len(images)), good.numpy()).tolist():
        names = images.names_of(index)
        if (first := found.get(short_id(names[0]))) is None:
            continue
        for name in names[1:]:
            error = SampleError(first.kind, f"{name}: the same bytes as {first.reason}")
            found.setdefault(short_id(name), Bad.of(name, error))
    return sorted(found.values())


def _log_bad(dataset: Dataset, bad: Sequence[Bad]) -> None:
    """Log a warning for each unreadable sample, once per data set."""
    named = _NAMED.setdefault(dataset, set())
    for one in {one.id: one for one in bad if one.id not in named}.values():
        log.warning("skipped: %s", one.reason)
        named.add(one.id)


@torch.no_grad()
def encode_images(model: CLIP, pixels: torch.Tensor, preprocess: Preprocess) -> torch.Tensor:
    """Unit features of pixels (B, 3, R, R) uint8: (B, E) float32 on the CPU."""
    device, dtype = model.logit_scale.device, next(model.parameters()).dtype
    features = [torch.empty(0, model.config.embed_dim)]
    for part in pixels.split(images_at_once(model)):
        part = normalize(part.to(device), preprocess.mean, preprocess.std).to(dtype)
        features.append(F.normalize(model.encode_image(part).float(), dim=-1).cpu())
    return torch.cat(features)


def images_at_once(model: CLIP) -> int:
    """The number of images for which a forward pass is fastest.

    On a CPU so few that malloc keeps the largest tensor, a ViT's hidden values or the output of a
    ResNet's first stage: every page of memory that is returned to the system is cleared and mapped
    again.
    """
    if model.logit_scale.device.type != "cpu":
        return 1 << 30
    config = model.config
    width, side = config.vision_width, config.image_resolution
    if config.vision_patch_size is None:
        values = (side // 4) ** 2 * 4 * width
    else:
        values = (side // config.vision_patch_size) ** 2 * int(width * config.vision_mlp_ratio)
    return max(1, min(_CPU_IMAGES, _MAX_KEPT // (4 * values)))


@torch.inference_mode()
def encode_texts(
    model: CLIP,
    texts: Sequence[str],
    *,
    batch_size: int = 256,
    shared: bool = False,
    truncate: bool = True,
    packed: bool = False,
) -> torch.Tensor:
    """Unit features of texts, (M, E) float32 on the CPU; each distinct text is encoded once.

    Args:
        model: in eval mode.
        texts: M of them.
        batch_size: texts of a forward pass.
        shared: every rank calls this, encodes its part, and gets all.
        truncate: cut texts that are longer than the context.
        packed: pack texts of different lengths into a batch; else a batch has one length.

    Raises:
        ConfigError: the model has fewer ids than its tokeniser.
        DataError: a text is longer than the context, and `truncate` is false.
    """
    check_vocabulary(model)
    place = {text: i for i, text in enumerate(dict.fromkeys(texts))}
    tokens = _tokens(list(place), model.tokenizer, truncate=truncate)
    lengths = model.tokenizer.lengths(tokens)
    rank, world_size = rank_and_world_size() if shared else (0, 1)
    device = model.logit_scale.device
    parts = [torch.empty(0, model.config.embed_dim)]
    own = [torch.empty(0).long()]
    for rows in _batches(lengths, batch_size, mixed=packed)[rank::world_size]:
        chosen = tokens[rows, : int(lengths[rows[-1]])].long().to(device)  # (B, L)
        encoded = model.encode_packed(chosen) if packed else model.encode_text(chosen)
        parts.append(F.normalize(encoded.float(), dim=-1).cpu())
        own.append(rows)
    found, rows = torch.cat(parts), torch.cat(own)
    if shared:
        found, rows = gather_rows(found)[0], gather_rows(rows)[0]
    features = torch.empty_like(found)
    features[rows] = found
    if len(place) == len(texts):
        return features
    return features[torch.tensor([place[text] for text in texts])]


def check_vocabulary(model: CLIP) -> None:
    """Check that a model has at least as many token ids as its tokeniser.

    Raises:
        ConfigError: it has fewer.
    """
    if model.config.vocab_size < model.tokenizer.vocab_size:
        raise ConfigError(
            f"the model has {model.config.vocab_size} token ids, {model.tokenizer.name} "
            f"{model.tokenizer.vocab_size}: "
            f"its texts need a tokeniser that leanclip does not have (pass token ids to "
            f"encode_text)"
        )


def _tokens(texts: Sequence[str], tokenizer: Tokenizer, *, truncate: bool) -> torch.Tensor:
    """Token ids of many texts as int32, which is half the memory."""
    chunks = [
        tokenizer(texts[first : first + _TEXTS], truncate=truncate).int()
        for first in range(0, len(texts), _TEXTS)
    ]
    return torch.cat([torch.empty(0, tokenizer.context_length, dtype=torch.int32), *chunks])


def _batches(lengths: torch.Tensor, size: int, *, mixed: bool) -> list[torch.Tensor]:
    """Rows in batches of at most `size`, by length; each of one length, unless `mixed`."""
    order = lengths.argsort(stable=True)
    if mixed:
        return list(order.split(size)) if len(order) else []
    counts = np.unique(lengths.numpy(), return_counts=True)[1].tolist()
    return [batch for same in order.split(counts) for batch in same.split(size)] if counts else []
