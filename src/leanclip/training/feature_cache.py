"""Locked towers run once: their features are cached in the run's folder.

    samples in order -> shards of blocks -> locked tower -> FeatureStore -> `FeatureCache.replace`

A shard is computed by one rank, block by block, so that the values do not depend on the number of
ranks. An interrupted computation continues with the shards that are missing. Captions are found
by a digest of 64 bits of their tokens: the chance that two of ten million different ones have the
same digest is 1 in 400,000.

Shapes: n rows of a block, N all rows, B batch, L tokens, E embedding.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from hashlib import blake2b, sha256
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F

from leanclip.config.data import DataConfig
from leanclip.config.model import ModelConfig
from leanclip.config.sections import to_plain
from leanclip.config.training import FinetuneConfig, Precision
from leanclip.data import Dataset
from leanclip.data.batch import Batch, trim
from leanclip.data.dataset import fill
from leanclip.data.formats.mixture import Mixture
from leanclip.data.loader import batches_at
from leanclip.data.skipped import Bad
from leanclip.distributed.collectives import all_gather_object, barrier, rank_and_world_size
from leanclip.errors import ConfigError
from leanclip.evaluation.feature_store import FeatureStore, read_index
from leanclip.evaluation.features import encode_images
from leanclip.io.progress import ProgressBar
from leanclip.model import CLIP
from leanclip.preprocess.images import Preprocess
from leanclip.preprocess.text import Tokenizer
from leanclip.training.finetune import group_of
from leanclip.training.step import AUTOCAST

BLOCK = 256  # samples, or captions, that are encoded at once
BLOCKS_PER_SHARD = 64
Block = range | list[str]  # samples by index, or captions


class CachedTower:
    """The features of one tower by a 64-bit key: a sample's index or the digest of a caption."""

    def __init__(self, store: FeatureStore) -> None:
        shards = [store.read(shard) for shard in range(store.shards)]
        self._shards = [np.asarray(features) for _, features in shards]  # still memory-mapped
        keys = np.concatenate([np.array(ids, np.uint64) for ids, _ in shards])
        order = keys.argsort(kind="stable")
        self._keys = keys[order]  # (N,)
        ends = np.cumsum([len(ids) for ids, _ in shards])
        self._shard_of = np.searchsorted(ends, order, side="right")  # (N,)
        self._row_of = order - np.append(0, ends)[self._shard_of]  # (N,) in its shard

    def get(self, keys: np.ndarray) -> torch.Tensor | None:
        """Features (B, E) of keys (B,) uint64; None where one of them is missing."""
        places = np.searchsorted(self._keys, keys)
        if (places == len(self._keys)).any() or (self._keys[places] != keys).any():
            return None
        shards, rows = self._shard_of[places], self._row_of[places]
        found = np.empty((len(keys), self._shards[0].shape[1]), np.float32)
        for shard in np.unique(shards):
            here = shards == shard
            found[here] = self._shards[shard][rows[here]]
        return torch.from_numpy(found)


@dataclass(frozen=True)
class FeatureCache:
    """The features of locked towers; without any, batches stay as they are."""

    image: CachedTower | None = None
    text: CachedTower | None = None
    known_bad: Mapping[int, Bad] | None = None  # as `training_batches` takes it
    tokenizer: Tokenizer = field(default_factory=Tokenizer)  # of the batches

    @property
    def is_used(self) -> bool:
        """Whether a tower is cached."""
        return self.image is not None or self.text is not None

    def replace(self, batch: Batch) -> Batch:
        """Features in place of the images or the tokens of a batch.

        A batch with a caption that was unreadable when the cache was computed keeps its tokens.
        """
        if self.image is not None and len(batch):
            images = self.image.get(batch.indices.numpy().astype(np.uint64))
            assert images is not None
            batch = replace(batch, images=images)
        if self.text is not None and len(batch):
            texts = self.text.get(_digests(batch.tokens, self.tokenizer))
            batch = batch if texts is None else replace(batch, tokens=texts)
        return batch


def cached_towers(
    finetune: FinetuneConfig, model: ModelConfig, data: DataConfig, dataset: Dataset
) -> list[str]:
    """The locked towers, of "image" and "text", whose input is the same in every epoch."""
    if not finetune.cache_features or dataset.is_stream:
        return []
    layers = model.vision_layers
    image_groups = 2 + (layers if isinstance(layers, int) else sum(layers))
    found = []
    is_same = not data.augment and len(data.patches or ()) <= 1
    if finetune.lock_image in ("all", image_groups) and is_same:
        found += [] if finetune.patch_dropout else ["image"]
    if finetune.lock_text in ("all", model.transformer_layers + 2):
        found.append("text")
    return found


def build_feature_cache(
    model: CLIP,
    towers: Sequence[str],
    dataset: Dataset,
    data: DataConfig,
    preprocess: Preprocess,
    folder: Path,
    precision: Precision,
) -> FeatureCache:
    """The features of `towers`, from `folder` or computed into it; every rank calls this.

    Raises:
        ConfigError: the ranks do not share the folder.
    """
    cache = FeatureCache(tokenizer=model.tokenizer)
    dtype = AUTOCAST.get(precision)
    for tower in towers:
        blocks = _sample_blocks(0, dataset.distinct) if tower == "image" else _text_blocks(dataset)
        shards = [blocks[n : n + BLOCKS_PER_SHARD] for n in range(0, len(blocks), BLOCKS_PER_SHARD)]
        store = FeatureStore(folder / tower, len(shards))
        if rank_and_world_size()[0] == 0:
            index = _index(model, tower, dataset, data, preprocess, precision)
            store.begin(index, overwrite=True)
        _check_shared(store)
        with (
            torch.inference_mode(),
            torch.autocast(model.logit_scale.device.type, dtype, enabled=dtype is not None),
        ):
            _compute(model, tower, dataset, data, preprocess, store, shards)
        _check_shared(store)
        found = CachedTower(store)
        if tower == "image":
            skipped = [store.skipped(shard) for shard in range(store.shards)]
            known_bad = {int(i): Bad(*bad) for part in skipped for i, bad in part.items()}
            cache = replace(cache, image=found, known_bad=known_bad)
        else:
            cache = replace(cache, text=found)
    return cache


def _check_shared(store: FeatureStore) -> None:
    """Raise on all ranks where one does not see the shards of the first one."""
    barrier()
    seen = all_gather_object((read_index(store.folder), store.missing()))
    for rank, one in enumerate(seen):
        if one != seen[0]:
            raise ConfigError(
                f"{store.folder}: rank {rank} does not see what rank 0 wrote; use an output_dir "
                f"that all ranks share, or set finetune.cache_features to false"
            )


def _compute(
    model: CLIP,
    tower: str,
    dataset: Dataset,
    data: DataConfig,
    preprocess: Preprocess,
    store: FeatureStore,
    shards: Sequence[Sequence[Block]],
) -> None:
    """Write this rank's part of the missing shards."""
    rank, world_size = rank_and_world_size()
    missing = store.missing()
    barrier()  # every rank has listed them before one writes
    mine = missing[rank::world_size]
    batches = batches_at(
        dataset,
        data,
        [block for shard in mine for block in shards[shard] if isinstance(block, range)],
        preprocess=preprocess,
        tokenizer=model.tokenizer,
        known_bad=None if tower == "image" else {},
    )
    total = sum(map(len, shards))
    done = total - sum(len(shards[shard]) for shard in missing)
    label = f"features of the locked {tower} tower"
    with ProgressBar(label, total, completed=done, is_silent=rank > 0) as bar:
        for shard in mine:
            keys, rows, skipped = [], [np.empty((0, model.config.embed_dim), np.float32)], {}
            for block in shards[shard]:
                if tower == "image":
                    batch = next(batches)
                    keys += batch.indices.tolist()
                    rows.append(encode_images(model, batch.images, preprocess).numpy())
                    unreadable = sorted(set(block) - set(batch.indices.tolist()))
                    skipped |= zip(map(str, unreadable), batch.bad, strict=True)
                else:
                    for tokens in _tokens(model, block, batches):
                        keys += _digests(tokens, model.tokenizer).tolist()
                        features = model.encode_text(tokens.to(model.logit_scale.device))
                        rows.append(F.normalize(features.float(), dim=-1).cpu().numpy())
                done += world_size
                bar.update(min(done, total))
            store.write(shard, keys, np.concatenate(rows), skipped)


def _tokens(model: CLIP, block: Block, batches: Iterator[Batch]) -> Iterator[torch.Tensor]:
    """The distinct captions of a block as tokens, (n, L) at a time."""
    if isinstance(block, range):
        captions = [caption for captions in next(batches).captions for caption in captions]
    else:
        captions = block
    texts = [text for text in dict.fromkeys(captions) if text.strip()]
    for first in range(0, len(texts), BLOCK):
        tokens = model.tokenizer(texts[first : first + BLOCK], truncate=True)
        yield trim(tokens, model.tokenizer)


def _sample_blocks(start: int, stop: int) -> list[Block]:
    return [range(n, min(n + BLOCK, stop)) for n in range(start, stop, BLOCK)]


def _text_blocks(dataset: Dataset) -> list[Block]:
    """Samples whose captions are to be read, and the prompts of class data."""
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


def _digests(tokens: torch.Tensor, tokenizer: Tokenizer) -> np.ndarray:
    """(n, L) -> (n,) uint64: of the tokens without padding, however much there is."""
    lengths = tokenizer.lengths(tokens).tolist()
    found = [
        blake2b(row[:length].tobytes(), digest_size=8).digest()
        for row, length in zip(tokens.numpy(), lengths, strict=True)
    ]
    return np.frombuffer(b"".join(found), np.uint64)


def _index(
    model: CLIP,
    tower: str,
    dataset: Dataset,
    data: DataConfig,
    preprocess: Preprocess,
    precision: Precision,
) -> dict[str, object]:
    """Everything that the features of a tower follow from."""
    weights = sha256()
    for name, tensor in model.state_dict().items():
        group = group_of(name, model.config)
        if group is not None and group.tower == tower:
            weights.update(name.encode())
            weights.update(tensor.detach().cpu().contiguous().numpy().data)
    free = ("workers", "max_bad_fraction", "cache_gigabytes", "shuffle_buffer", "epoch_size")
    return {
        "weights": weights.hexdigest(),
        "model": to_plain(model.config),
        "data": {name: value for name, value in to_plain(data).items() if name not in free},
        "preprocess": asdict(preprocess),
        "tokenizer": model.tokenizer.fingerprint(),
        "samples": dataset.distinct,
        "precision": precision,
        "block": BLOCK,
        "blocks_per_shard": BLOCKS_PER_SHARD,
    }
