"""Locked towers run once: their features are kept in the run's folder, mapped into memory.

    samples in order -> blocks -> locked tower -> features/image/ -> `FeatureCache.replace`

A block is computed by one rank, whole, so the values are the same for any number of ranks. What
is finished of an interrupted computation stays. Captions are found again by a digest of 64 bits
of their tokens: among ten million different ones two have the same in one run of 400,000.

Shapes: n rows of a block, N all rows, L tokens, E embedding.
"""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from hashlib import blake2b, sha256
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.nn import functional as F

from leanclip.config.schema import Config
from leanclip.config.sections import to_plain
from leanclip.data import Dataset
from leanclip.data.batch import Batch, trim
from leanclip.data.dataset import fill
from leanclip.data.formats.mixture import Mixture
from leanclip.data.loader import batches_at
from leanclip.data.skipped import Bad
from leanclip.distributed.collectives import all_gather_object, barrier, rank_and_world_size
from leanclip.errors import ConfigError
from leanclip.evaluation.features import encode_images
from leanclip.io.files import split_lines, write_text
from leanclip.io.progress import ProgressBar
from leanclip.model import CLIP
from leanclip.preprocess.images import Preprocess
from leanclip.preprocess.tokenizer import tokenize
from leanclip.training.finetune import group_of
from leanclip.training.step import AUTOCAST

BLOCK = 256  # samples, or captions, that a rank takes at once
ROWS, DIGESTS, BLOCKS = "rows.f32", "digests.u64", "blocks.jsonl"
Block = range | list[str]  # samples by index, or captions


class FeatureCache(NamedTuple):
    """The features of locked towers; without any, batches stay as they are."""

    image: np.ndarray | None = None  # (N, E), by the samples' index
    text: np.ndarray | None = None  # (N, E)
    digests: np.ndarray = np.empty(0, np.uint64)  # (N,) of captions, sorted
    rows: np.ndarray = np.empty(0, np.int64)  # (N,) a digest's row in `text`
    undecoded: Mapping[int, Bad] | None = None  # as `training_batches` takes it

    @property
    def is_used(self) -> bool:
        """Whether there are any."""
        return self.image is not None or self.text is not None

    def replace(self, batch: Batch) -> Batch:
        """Features in place of the images or the tokens of a batch.

        A batch with a caption that could not be read before stays: the tower runs for it.
        """
        if self.image is not None:
            images = torch.from_numpy(self.image[batch.indices.numpy()])
            batch = replace(batch, images=images)
        if self.text is not None and len(batch):
            wanted = _digests(batch.tokens)
            places = np.searchsorted(self.digests, wanted).clip(max=len(self.digests) - 1)
            if (self.digests[places] == wanted).all():
                rows = self.text[self.rows[places]]
                batch = replace(batch, tokens=torch.from_numpy(rows))
        return batch


def cached_towers(config: Config, dataset: Dataset) -> list[str]:
    """The towers that see the same each time and stay the same: of "image" and "text"."""
    finetune, model = config.finetune, config.model
    if not finetune.cache_features or dataset.is_stream:
        return []
    layers = model.vision_layers
    image_groups = 2 + (layers if isinstance(layers, int) else sum(layers))
    found = []
    if finetune.lock_image in ("all", image_groups) and not config.data.augment:
        found += [] if finetune.patch_dropout else ["image"]
    if finetune.lock_text in ("all", model.transformer_layers + 2):
        found.append("text")
    return found


def build_feature_cache(
    model: CLIP, config: Config, dataset: Dataset, preprocess: Preprocess, folder: Path
) -> FeatureCache:
    """The features of locked towers, from `folder` or computed into it; every rank calls this.

    Raises:
        ConfigError: another rank does not see what the first one wrote into the folder.
    """
    frozen = FeatureCache()
    for tower in cached_towers(config, dataset):
        path, is_first = folder / tower, rank_and_world_size()[0] == 0
        store = (
            _Store(path, _about(model, config, dataset, preprocess, tower)) if is_first else None
        )
        blocks = _sample_blocks(0, dataset.distinct) if tower == "image" else _text_blocks(dataset)
        _compute(model, config, dataset, preprocess, tower, blocks, store)
        barrier()
        _check_shared(path)
        rows = _mapped(path / ROWS, np.float32).reshape(-1, config.model.embed_dim)
        if tower == "image":
            frozen = frozen._replace(image=rows, undecoded=_bad(path))
        else:
            digests = _mapped(path / DIGESTS, np.uint64)
            order = digests.argsort(kind="stable")
            frozen = frozen._replace(text=rows, digests=digests[order], rows=order)
    return frozen


def _check_shared(folder: Path) -> None:
    """See that all ranks have the first one's features; an error is raised on all of them."""
    rows, about = folder / ROWS, folder / "about.json"
    is_there = rows.is_file() and about.is_file()
    seen = all_gather_object((rows.stat().st_size, about.read_text()) if is_there else ())
    for rank, one in enumerate(seen):
        if one != seen[0]:
            raise ConfigError(
                f"{folder}: rank {rank} does not see what rank 0 wrote there; put output_dir where "
                f"all ranks see it, or set finetune.cache_features to false"
            )


def _compute(
    model: CLIP,
    config: Config,
    dataset: Dataset,
    preprocess: Preprocess,
    tower: str,
    blocks: Sequence[Block],
    store: "_Store | None",
) -> None:
    """Add what the store lacks, a block of each rank at a time."""
    rank, world_size = rank_and_world_size()
    done = all_gather_object(store.blocks if store else 0)[0]
    if done == len(blocks):
        return
    mine = blocks[done:][rank::world_size]
    batches = batches_at(
        dataset,
        config.data,
        [block for block in mine if isinstance(block, range)],
        preprocess=preprocess,
        context_length=model.context_length,
        undecoded=None if tower == "image" else {},
    )
    encode = _encode_images if tower == "image" else _encode_texts
    with ProgressBar(
        f"features of the locked {tower} tower", len(blocks), completed=done, is_silent=rank > 0
    ) as bar:
        for number in range(-(-(len(blocks) - done) // world_size)):
            part = None
            if number < len(mine):
                part = encode(model, config, preprocess, mine[number], batches)
            for computed in all_gather_object(part):  # in the order of blocks
                if store is not None and computed is not None:
                    store.add(computed)
                done += 1
            bar.update(done)


class _Computed(NamedTuple):
    """The features of a block."""

    rows: np.ndarray  # (n, E) float32
    digests: np.ndarray  # (n,) uint64 of captions; (0,) of images
    bad: dict[int, Bad]  # samples that cannot be used, by index


@torch.inference_mode()
def _encode_images(
    model: CLIP, config: Config, preprocess: Preprocess, block: Block, batches: Iterator[Batch]
) -> _Computed:
    """Unit features of every image of a block, zeros for those that cannot be read."""
    assert isinstance(block, range)
    batch = next(batches)
    rows = torch.zeros(len(block), config.model.embed_dim)
    if len(batch):
        with _as_in_training(model, config):
            rows[batch.indices - block.start] = encode_images(model, batch.images, preprocess)
    lost = sorted(set(block) - set(batch.indices.tolist()))
    bad = dict(zip(lost, batch.bad, strict=True))
    return _Computed(rows.numpy(), np.empty(0, np.uint64), bad)


@torch.inference_mode()
def _encode_texts(
    model: CLIP, config: Config, preprocess: Preprocess, block: Block, batches: Iterator[Batch]
) -> _Computed:
    """Unit features of every caption of a block; those of samples that cannot be read lack."""
    if isinstance(block, range):
        said = [caption for captions in next(batches).captions for caption in captions]
    else:
        said = block
    texts = [text for text in dict.fromkeys(said) if text.strip()]
    rows, digests = [np.empty((0, config.model.embed_dim), np.float32)], []
    for first in range(0, len(texts), BLOCK):
        tokens = trim(tokenize(texts[first : first + BLOCK], model.context_length, truncate=True))
        with _as_in_training(model, config):
            features = model.encode_text(tokens.to(model.logit_scale.device))
        rows.append(F.normalize(features.float(), dim=-1).cpu().numpy())
        digests += _digests(tokens).tolist()
    return _Computed(np.concatenate(rows), np.array(digests, np.uint64), {})


def _as_in_training(model: CLIP, config: Config) -> torch.autocast:
    dtype = AUTOCAST.get(config.train.precision)
    return torch.autocast(model.logit_scale.device.type, dtype, enabled=dtype is not None)


def _sample_blocks(start: int, stop: int) -> list[Block]:
    return [range(n, min(n + BLOCK, stop)) for n in range(start, stop, BLOCK)]


def _text_blocks(dataset: Dataset) -> list[Block]:
    """Samples of which the captions are to be read, and the prompts of class data."""
    blocks: list[Block] = []
    sources = dataset.sources if isinstance(dataset, Mixture) else [dataset]
    start = 0
    for source in sources:
        if source.classes:
            prompts = [text for name in source.classes for text in fill(source.templates, name)]
            blocks += [prompts[n : n + BLOCK] for n in range(0, len(prompts), BLOCK)]
        else:
            blocks += _sample_blocks(start, start + source.distinct)
        start += source.distinct
    return blocks


def _digests(tokens: torch.Tensor) -> np.ndarray:
    """(n, L) -> (n,) uint64: of the tokens up to the end token, whatever is behind it."""
    ends = tokens.argmax(dim=1).tolist()  # the end token has the highest id
    found = [
        blake2b(row[: end + 1].tobytes(), digest_size=8).digest()
        for row, end in zip(tokens.numpy(), ends, strict=True)
    ]
    return np.frombuffer(b"".join(found), np.uint64)


def _about(
    model: CLIP, config: Config, dataset: Dataset, preprocess: Preprocess, tower: str
) -> dict[str, object]:
    """What the features follow from."""
    weights = sha256()
    for name, tensor in model.state_dict().items():
        group = group_of(name, config.model)
        if group is not None and group.tower == tower:
            weights.update(name.encode())
            weights.update(tensor.detach().cpu().contiguous().numpy().data)
    free = ("workers", "max_bad_fraction", "cache_gigabytes", "shuffle_buffer", "epoch_size")
    data = {name: value for name, value in to_plain(config.data).items() if name not in free}
    return {
        "weights": weights.hexdigest(),
        "model": to_plain(config.model),
        "data": data,
        "preprocess": asdict(preprocess),
        "samples": dataset.distinct,
        "precision": config.train.precision,
        "block": BLOCK,
    }


class _Store:
    """Rows in files of a folder, added a block at a time; a block counts with its line of JSON.

    What there is of the same `about` stays, anything else is written over.
    """

    def __init__(self, folder: Path, about: dict[str, object]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        described, text = folder / "about.json", json.dumps(about, sort_keys=True) + "\n"
        is_same = described.is_file() and described.read_text() == text
        lines = _lines(folder) if is_same else []
        sizes = lines[-1]["sizes"] if lines else {ROWS: 0, DIGESTS: 0}
        self.blocks, self._files = len(lines), {}
        for name, size in sizes.items():
            self._files[name] = file = (folder / name).open("ab")
            file.truncate(size)  # what was written without its line
        whole = "".join(json.dumps(line) + "\n" for line in lines)
        write_text(folder / BLOCKS, whole)  # without a half line
        write_text(described, text)
        self._lines = (folder / BLOCKS).open("a")

    def add(self, computed: _Computed) -> None:
        """Write a block, then that it is there."""
        for name, array in ((ROWS, computed.rows), (DIGESTS, computed.digests)):
            self._files[name].write(array.tobytes())
            self._files[name].flush()
            os.fsync(self._files[name].fileno())
        sizes = {name: file.tell() for name, file in self._files.items()}
        self._lines.write(json.dumps({"sizes": sizes, "bad": computed.bad}) + "\n")
        self._lines.flush()
        self.blocks += 1


def _lines(folder: Path) -> list[dict[str, Any]]:
    """The lines of the blocks that are there whole."""
    path, found = folder / BLOCKS, []
    for line in split_lines(path.read_text()) if path.is_file() else ():
        try:
            found.append(json.loads(line))
        except ValueError:  # cut short by a crash
            break
    return found


def _bad(folder: Path) -> dict[int, Bad]:
    """The samples that cannot be used, by index."""
    return {int(i): Bad(*one) for line in _lines(folder) for i, one in line["bad"].items()}


def _mapped(path: Path, dtype: type) -> np.ndarray:
    """An array that is mapped into memory; an empty file cannot be."""
    return np.memmap(path, dtype, "r") if path.stat().st_size else np.empty(0, dtype)
