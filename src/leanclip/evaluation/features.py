"""Unit features of images and texts, in batches, without gradients, over all ranks.

    a data set -> distinct images -> this rank's batches -> features -> everyone's, by digest
    texts -> the distinct ones, by length -> batches of one length, without padding -> features

What a batch holds does not depend on the number of ranks, so the features do not either.

Shapes: N images, M texts, E embedding, B batch, L tokens.
"""

import hashlib
import json
import logging
from collections.abc import Collection, Iterator, Sequence
from typing import NamedTuple
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch.nn import functional as F

from leanclip.config.data import DataConfig
from leanclip.data import Dataset
from leanclip.data.batch import Batch
from leanclip.data.loader import evaluation_batches
from leanclip.data.skipped import Bad, SkipTracker, short_id
from leanclip.distributed.collectives import all_gather_object, gather_rows, rank_and_world_size
from leanclip.errors import ConfigError, DataError, SampleError
from leanclip.evaluation.distinct import DistinctImages, distinct_images
from leanclip.io.progress import ProgressBar
from leanclip.model import CLIP
from leanclip.preprocess.images import Preprocess, normalize
from leanclip.preprocess.tokenizer import END, VOCAB_SIZE, tokenize

log = logging.getLogger("leanclip")

_TEXTS = 4096  # that are tokenised at a time
_ALL = 1 << 30  # images, of a batch on a GPU
_IMAGES = 32  # more at a time make a CPU no faster, however small the model
_KEPT = 32 << 20  # bytes, the most of a tensor that malloc keeps for the next
_NAMED: WeakKeyDictionary[Dataset, set[str]] = WeakKeyDictionary()  # ids that a warning named


class Encoded(NamedTuple):
    """The readable images of a data set, in the order of their digests."""

    features: torch.Tensor  # (N, E) float32, of unit length
    indices: torch.Tensor  # (N,) int64, in the data set; of several rows the first
    labels: torch.Tensor  # (N,) int64, of class data; -1 elsewhere
    captions: list[Sequence[str]]  # N, of data that is no class data
    digests: torch.Tensor  # (N,) int64, of image files and their captions or labels
    bad: dict[str, str]  # those that could not be read: id -> reason
    available: int  # images of the data set, of which these may be a sample

    def chosen(self, rows: torch.Tensor) -> "Encoded":
        """Some of the images of class data."""
        return Encoded(
            self.features[rows],
            self.indices[rows],
            self.labels[rows],
            [],
            self.digests[rows],
            self.bad,
            self.available,
        )

    def fingerprint(self, classes: Sequence[str] = ()) -> str:
        """SHA-256 over the images' digests, from the lowest up, and the names of classes.

        An image's digest is the BLAKE2b, of eight bytes, of its file and its label or captions:
        the same data gives the same, in any place, order and format.
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
        model: in evaluation mode; the same on every rank.
        dataset: what `data` describes.
        data: workers and limits.
        preprocess: of the model.
        batch_size: the most images of a forward pass; a CPU takes them in smaller parts.
        limit: a sample of so many images, the same for every model; see `distinct_images`.
        label: of the progress bar.

    Raises:
        DataError: more than the allowed share of the images that were tried is unreadable, or all.
    """
    pairs = [(model, preprocess)]
    (found,) = encode_each(pairs, dataset, data, batch_size=batch_size, limit=limit, label=label)
    return found


def encode_each(
    models: Collection[tuple[CLIP, Preprocess]],
    dataset: Dataset,
    data: DataConfig,
    *,
    batch_size: int,
    limit: int | None = None,
    label: str = "encoding",
) -> list[Encoded]:
    """Features by several models that see the same pixels: each image is decoded once.

    `models` is gone through for every batch; otherwise as `encode_dataset`.
    """
    rank, world_size = rank_and_world_size()
    images, distinct = dataset, None
    if limit is not None or not dataset.classes:  # all of class data is measured row by row
        images = distinct = distinct_images(dataset, limit, workers=data.workers)
    tracker = SkipTracker(distinct.names if distinct else len(dataset), data.max_bad_fraction)
    facts, captions, bad = [torch.empty(0, 3).long()], [], []
    features = [[torch.empty(0, model.config.embed_dim)] for model, _ in models]
    batches = _own_batches(next(iter(models)), images, data, batch_size)
    with ProgressBar(label, len(images), is_silent=rank > 0) as bar:
        done = 0
        for batch in batches:
            bad += batch.bad
            if tracker.is_over(len(bad)):  # reported below, over all ranks
                break
            if len(batch):
                for parts, (model, preprocess) in zip(features, models, strict=True):
                    parts.append(encode_images(model, batch.images, preprocess))
                facts.append(torch.stack([batch.indices, batch.labels, batch.digests], dim=1))
                captions += [] if dataset.classes else batch.captions
            done += len(batch) + len(batch.bad)
            bar.update(min(done * world_size, len(images)))
    numbers = gather_rows(torch.cat(facts))[0]
    bad = sorted(one for part in all_gather_object(bad) for one in part)
    tracker.add(bad)  # ends here where a rank has stopped early
    if distinct:
        bad = _bad_rows(distinct, numbers[:, 0], bad)
    reasons = _report_bad(dataset, tracker, bad)
    if not len(numbers):
        raise DataError(f"{data.root}: none of the images is readable")
    captions = [several for part in all_gather_object(captions) for several in part]
    order = torch.from_numpy(np.lexsort(numbers[:, [0, 2]].T.numpy()))
    places, labels, digests = numbers[order].unbind(dim=1)
    if captions:
        captions = [captions[i] for i in order.tolist()]
    indices = torch.from_numpy(distinct.first_rows)[places] if distinct else places
    available = distinct.available if distinct else len(dataset)
    about = (indices, labels, captions, digests, reasons, available)
    return [Encoded(gather_rows(torch.cat(parts))[0][order], *about) for parts in features]


def _own_batches(
    model: tuple[CLIP, Preprocess], images: Dataset, data: DataConfig, batch_size: int
) -> Iterator[Batch]:
    """This rank's batches, as a model reads them."""
    rank, world_size = rank_and_world_size()
    return evaluation_batches(
        images,
        data,
        preprocess=model[1],
        context_length=model[0].context_length,
        batch_size=batch_size,
        rank=rank,
        world_size=world_size,
    )


def _bad_rows(images: DistinctImages, good: torch.Tensor, bad: Sequence[Bad]) -> list[Bad]:
    """Every sample that shows one of the images that are bad; `good` are the others' indices."""
    found = {one.id: one for one in bad}
    for index in np.setdiff1d(np.arange(len(images)), good.numpy()).tolist():
        names = images.names_of(index)
        if (first := found.get(short_id(names[0]))) is None:
            continue
        for name in names[1:]:
            error = SampleError(first.kind, f"{name}: the same bytes as {first.reason}")
            found.setdefault(short_id(name), Bad.of(name, error))
    return sorted(found.values())


def _report_bad(dataset: Dataset, tracker: SkipTracker, bad: Sequence[Bad]) -> dict[str, str]:
    """What could not be read: id -> reason. A warning names each, once for a data set.

    Raises:
        DataError: it is too much.
    """
    tracker.add(bad)
    named = _NAMED.setdefault(dataset, set())
    for one in {one.id: one for one in bad}.values():
        if one.id not in named:
            log.warning("skipped: %s", one.reason)
            named.add(one.id)
    return {one.id: one.reason for one in bad}


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
    """Of how many images a forward pass is fastest: on a CPU so few that its tensors are kept.

    glibc's malloc gives tensors of over 32 MiB back to the system, and every page of the next
    one is cleared and mapped anew. What is by far the largest: a ViT's hidden values, and what
    leaves a block of a ResNet's first stage.
    """
    if model.logit_scale.device.type != "cpu":
        return _ALL
    config = model.config
    width, side = config.vision_width, config.image_resolution
    if config.vision_patch_size is None:
        values = (side // 4) ** 2 * 4 * width
    else:
        values = (side // config.vision_patch_size) ** 2 * int(width * config.vision_mlp_ratio)
    return max(1, min(_IMAGES, _KEPT // (4 * values)))


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

    Batches are of texts of one length, so that nothing is padded.

    Args:
        model: in evaluation mode.
        texts: M of them.
        batch_size: texts of a forward pass.
        shared: every rank calls this, encodes its part, and gets all.
        truncate: cut texts that are over the context.
        packed: batches of texts of several lengths, without padding.

    Raises:
        ConfigError: the model has another tokeniser.
        DataError: a text is over the context, and `truncate` is false.
    """
    check_vocabulary(model)
    place = {text: i for i, text in enumerate(dict.fromkeys(texts))}
    tokens = _tokens(list(place), model.context_length, truncate=truncate)
    lengths = (tokens == END).int().argmax(dim=1) + 1
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
    """See that a model can have CLIP's tokeniser.

    Raises:
        ConfigError: it has too few token ids.
    """
    if model.config.vocab_size < VOCAB_SIZE:
        raise ConfigError(
            f"the model has {model.config.vocab_size} token ids, CLIP's tokeniser {VOCAB_SIZE}: "
            f"its texts need a tokeniser that leanclip does not have (give its own ids to "
            f"encode_text)"
        )


def _tokens(texts: Sequence[str], context_length: int, *, truncate: bool) -> torch.Tensor:
    """Ids of many texts in half the memory of int64."""
    chunks = [
        tokenize(texts[first : first + _TEXTS], context_length, truncate=truncate).int()
        for first in range(0, len(texts), _TEXTS)
    ]
    return torch.cat([torch.empty(0, context_length, dtype=torch.int32), *chunks])


def _batches(lengths: torch.Tensor, size: int, *, mixed: bool) -> list[torch.Tensor]:
    """Rows in batches of at most `size`, by length; each of one length, unless `mixed`."""
    order = lengths.argsort(stable=True)
    if mixed:
        return list(order.split(size)) if len(order) else []
    counts = np.unique(lengths.numpy(), return_counts=True)[1].tolist()
    return [batch for same in order.split(counts) for batch in same.split(size)] if counts else []
