"""Features of many images on disk: in shards, computed by several ranks, resumable.

    FOLDER -> paths in order -> parts of a fixed size -> threads decode -> features -> FeatureStore

A shard has the features of a fixed part of the paths and is computed by one rank (every
world-size-th shard, from the rank-th). Finished shards are never computed again.

Shapes: n rows of a shard, N all rows, E embedding.
"""

import hashlib
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, get_args

import numpy as np

from leanclip.data.dataset import StringArray
from leanclip.data.readers.image_files import find_images
from leanclip.data.skipped import Bad, SkipTracker
from leanclip.errors import ConfigError, DataError, SampleError, escaped
from leanclip.evaluation.feature_store import FeatureStore, Format, read_index
from leanclip.inference.model import InferenceModel
from leanclip.io.files import try_lock
from leanclip.io.progress import ProgressBar
from leanclip.io.threads import map_in_threads
from leanclip.preprocess.images import evaluation_pixels
from leanclip.weights import fingerprint

log = logging.getLogger("leanclip")

DTYPES = ("float32", "float16")


class Source:
    """Images by number: the files in a folder, or a list of paths; ids are names in the folder."""

    def __init__(self, folder: Path | None, names: Sequence[str]) -> None:
        self.folder, self.names = folder, StringArray(names)

    @classmethod
    def of(cls, folder: Path) -> "Source":
        """Every image in a folder and below it, in the order of paths.

        Raises:
            DataError: there is no such folder, or it has no images.
        """
        if not folder.is_dir():
            raise DataError(f"{folder}: no such folder")
        return cls(folder, [path.relative_to(folder).as_posix() for path in find_images(folder)])

    def path(self, number: int) -> Path:
        """The path of an image."""
        name = self.names[number]
        return self.folder / name if self.folder else Path(name)

    def digest(self) -> str:
        """SHA-256 of all ids."""
        found = hashlib.sha256()
        for number in range(len(self.names)):
            found.update(json.dumps(self.names[number]).encode() + b"\n")
        return found.hexdigest()


def embed(
    clip: InferenceModel,
    source: Source,
    out: Path,
    *,
    shard_size: int = 10_000,
    batch_size: int = 64,
    workers: int | None = None,
    format: str = "npy",
    dtype: str = "float32",
    max_bad_fraction: float = 0.01,
    rank: int = 0,
    world_size: int = 1,
) -> None:
    """Write unit features of images; finished shards are kept.

    Args:
        clip: the model.
        source: the images.
        out: a folder, new or from an interrupted run with the same arguments.
        shard_size: images per shard.
        batch_size: maximum images per forward pass.
        workers: threads that decode; None: one per CPU core, at most eight.
        format: "npy" or "parquet".
        dtype: of the stored features: "float32" or "float16".
        max_bad_fraction: the fraction of all images, over all ranks, that may be unreadable; they
            are skipped with a warning.
        rank: which of `world_size` processes this is.
        world_size: processes that share the work; they need not run at the same time.

    Raises:
        ConfigError: an argument is invalid, or `out` has other features or files.
        DataError: there are no images, or too many are unreadable.
    """
    count = len(source.names)
    if not count:
        raise DataError("embed: no images; give a folder, or one path per line on standard input")
    index = _index(clip, source, shard_size, format, dtype)
    store = _store(out, index)
    store.begin(index)
    lock = out / f".{rank}-of-{world_size}.lock"
    with try_lock(lock) as is_acquired:
        if not is_acquired:
            raise ConfigError(f"{out}: another process embeds there; choose another --out")
        try:
            tracker = SkipTracker(count, max_bad_fraction, option="--max-bad-fraction")
            parts = {
                shard: range(count)[shard * shard_size : (shard + 1) * shard_size]
                for shard in range(rank, store.shards, world_size)
            }
            _write_shards(clip, source, store, parts, np.dtype(dtype), batch_size, workers, tracker)
        finally:
            lock.unlink(missing_ok=True)


def _index(
    clip: InferenceModel, source: Source, shard_size: int, format: str, dtype: str
) -> dict[str, Any]:
    for name, value, known in (("format", format, get_args(Format)), ("dtype", dtype, DTYPES)):
        if value not in known:
            raise ConfigError(f"embed: unknown {name} {value}; known: {', '.join(known)}")
    return {
        "images": len(source.names),
        "ids": source.digest(),
        "weights": fingerprint(clip.model.state_dict()),
        "embed_dim": clip.model.config.embed_dim,
        "shard_size": shard_size,
        "format": format,
        "dtype": dtype,
    }


def _write_shards(
    clip: InferenceModel,
    source: Source,
    store: FeatureStore,
    parts: Mapping[int, range],
    dtype: np.dtype,
    batch_size: int,
    workers: int | None,
    tracker: SkipTracker,
) -> None:
    """Compute the missing ones of some shards, given as the numbers of their images."""

    def read(_: int, number: int) -> tuple[str, np.ndarray | SampleError]:
        try:
            pixels = evaluation_pixels(source.path(number), clip.preprocess)
        except SampleError as error:
            return source.names[number], error
        return source.names[number], pixels

    pending = sorted(parts.keys() & set(store.missing()))
    total = sum(map(len, parts.values()))
    done = total - sum(len(parts[shard]) for shard in pending)
    if done:
        log.info("%d of %d shards are finished", len(parts) - len(pending), len(parts))
    _check_skipped(tracker, store, {})
    numbers = (number for shard in pending for number in parts[shard])
    decoded = map_in_threads(read, numbers, workers, batch_size)
    with ProgressBar("embedding", total, completed=done, is_silent=0 not in parts) as bar:
        for shard in pending:
            ids, skipped = [], {}
            rows = [np.empty((0, clip.model.config.embed_dim), dtype)]
            for first in range(0, len(parts[shard]), batch_size):
                batch = list(islice(decoded, min(batch_size, len(parts[shard]) - first)))
                good = [(name, read) for name, read in batch if isinstance(read, np.ndarray)]
                ids += [name for name, _ in good]
                if good:
                    pixels = clip.preprocess.stack([pixels for _, pixels in good])
                    rows.append(clip.embed_pixels(pixels).numpy().astype(dtype))
                for name, error in batch:
                    if isinstance(error, SampleError):
                        skipped[name] = str(error)
                        log.warning("skipped: %s: %s", escaped(name), error)
                done += len(batch)
                bar.update(done)
            _check_skipped(tracker, store, skipped)
            store.write(shard, ids, np.concatenate(rows), skipped)
            _check_skipped(tracker, store, {})  # of ranks that finished at the same time


def _check_skipped(tracker: SkipTracker, store: FeatureStore, new: Mapping[str, str]) -> None:
    """Count the skipped images of a new shard and of the finished shards of all ranks.

    Raises:
        DataError: they are too many.
    """
    skipped = dict(new)
    for shard in range(store.shards):
        skipped |= store.skipped(shard)
    tracker.add([Bad.of(n, SampleError("unreadable image", skipped[n])) for n in skipped])


def read_embeddings(folder: str | Path) -> tuple[list[str], np.ndarray]:
    """All ids and features (N, E) of a folder, in the order of the ids.

    Raises:
        ConfigError: the folder has no embeddings.
        DataError: shards are missing: `leanclip embed` was interrupted.
    """
    ids: list[str] = []
    rows: list[np.ndarray] = []
    for names, features in shards_of(folder):
        ids += names
        rows.append(features)
    return ids, np.concatenate(rows)


def shards_of(folder: str | Path) -> Iterator[tuple[list[str], np.ndarray]]:
    """The ids and features (n, E) of each shard; those in the npy format are memory-mapped.

    Raises:
        ConfigError: the folder has no embeddings.
        DataError: shards are missing: `leanclip embed` was interrupted.
    """
    store = _store(Path(folder), embeddings_index(Path(folder)))
    if missing := store.missing():
        raise DataError(
            f"{folder}: {len(missing)} of {store.shards} shards are missing, the first is "
            f"{store.path(missing[0]).name}; run leanclip embed again"
        )
    yield from map(store.read, range(store.shards))


def embeddings_index(folder: Path) -> dict[str, Any]:
    """What a folder has embeddings of: images, ids, weights, embed_dim, shard_size, format, dtype.

    Raises:
        ConfigError: the folder has no embeddings.
    """
    index = read_index(folder)
    if "ids" not in index:
        raise ConfigError(f"{folder}: no embeddings; compute them with leanclip embed")
    return index


def summary(out: Path) -> dict[str, Any]:
    """Counts of images and shards so far, as plain values."""
    index = embeddings_index(out)
    store = _store(out, index)
    return {
        "out": str(out),
        "images": index["images"],
        "skipped": sum(len(store.skipped(shard)) for shard in range(store.shards)),
        "shards": store.shards,
        "missing_shards": len(store.missing()),
        "embed_dim": index["embed_dim"],
        "format": index["format"],
        "dtype": index["dtype"],
    }


def _store(folder: Path, index: Mapping[str, Any]) -> FeatureStore:
    shards = -(-index["images"] // index["shard_size"])
    return FeatureStore(folder, shards, index["format"])
