"""Features of very many images on disk: in shards, over ranks, taken up where they were left.

    FOLDER -> ids, in order -> shards of so many -> threads decode -> features -> one file each

    OUT/_index.json          what it is of: weights, ids, sizes; a later start must agree
    OUT/00000.npy            features (n, E) of unit length       } or 00000.parquet with both:
    OUT/00000.ids.json       a list of n ids: paths in FOLDER     } columns `id` and `embedding`,
                             the bytes of an id that are not UTF-8  written as in "caf\\xe9.png"
    OUT/_00000.skipped.json  images that cannot be read, where there are any: id -> reason

A shard is of a fixed part of the ids, made by one rank (every world-size-th shard, from the
rank-th), and its last file appears whole: what is there is finished, and is never made again.

Shapes: n rows of a shard, N of all, E embedding.
"""

import hashlib
import json
import logging
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch

from leanclip.data.dataset import StringArray
from leanclip.data.readers.image_files import find_images
from leanclip.data.skipped import Bad, SkipTracker
from leanclip.errors import ConfigError, DataError, SampleError, escaped
from leanclip.inference.model import InferenceModel
from leanclip.io.files import atomic_write, try_lock, write_array, write_text
from leanclip.io.progress import ProgressBar
from leanclip.io.threads import in_threads
from leanclip.preprocess.images import Preprocess, evaluation_pixels
from leanclip.weights import fingerprint

log = logging.getLogger("leanclip")

FORMATS = ("npy", "parquet")
DTYPES = ("float32", "float16")
_ESCAPED = b"leanclip_escaped"  # of a Parquet file: rows whose ids are not UTF-8, so escaped


@dataclass(frozen=True)
class Index:
    """What a folder of embeddings is of."""

    images: int  # ids, readable or not
    ids: str  # SHA-256 of all ids, in order
    weights: str  # SHA-256 of the model's tensors
    embed_dim: int
    shard_size: int
    format: str  # npy or parquet
    dtype: str  # of what is stored: float32 or float16

    @property
    def shards(self) -> int:
        """How many shards there are in the end."""
        return -(-self.images // self.shard_size)


class Source:
    """Images by number, each with an id: the files under a folder, or of a list of paths."""

    def __init__(self, folder: Path | None, names: Sequence[str]) -> None:
        self.folder, self.names = folder, StringArray(names)

    @classmethod
    def of(cls, folder: Path) -> "Source":
        """Every image under a folder, in the order of paths.

        Raises:
            DataError: there is no such folder, or it has no images.
        """
        if not folder.is_dir():
            raise DataError(f"{folder}: no such folder")
        return cls(folder, [path.relative_to(folder).as_posix() for path in find_images(folder)])

    def path(self, number: int) -> Path:
        """Where an image is."""
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
    """Write the features of a source's images; shards that are there are kept.

    Args:
        clip: the model.
        source: the images.
        out: a folder, new or of an earlier start of the same.
        shard_size: images of a shard.
        batch_size: the most images of a forward pass.
        workers: threads that decode; None: one per CPU core, eight at most.
        format: "npy" or "parquet" (the extra `table`).
        dtype: of what is stored: "float32" or "float16".
        max_bad_fraction: the share of all images, over all ranks, that may be unreadable; they are
            skipped and named.
        rank: whose shards to make, of `world_size`.
        world_size: how many share the work; they need not run at the same time.

    Raises:
        ConfigError: a setting is wrong, or `out` holds something else.
        DataError: there are no images, or too many are unreadable.
    """
    if not len(source.names):
        raise DataError("embed: no images; give a folder, or paths on standard input, one a line")
    index = _index(clip, source, shard_size, format, dtype)
    _open(out, index)
    lock = out / f".{rank}-of-{world_size}.lock"
    with try_lock(lock) as is_acquired:
        if not is_acquired:
            raise ConfigError(f"{out}: another process embeds there; choose another --out")
        try:
            _make_shards(
                clip, source, out, index, batch_size, workers, max_bad_fraction, rank, world_size
            )
        finally:
            lock.unlink(missing_ok=True)
    if not _missing(out, index):
        for part in out.glob(".*.part"):  # of starts that were killed
            part.unlink(missing_ok=True)


def _make_shards(
    clip: InferenceModel,
    source: Source,
    out: Path,
    index: Index,
    batch_size: int,
    workers: int | None,
    max_bad_fraction: float,
    rank: int,
    world_size: int,
) -> None:
    """This rank's shards that are not there yet."""
    format, dtype = index.format, index.dtype
    mine = range(rank, index.shards, world_size)
    pending = [number for number in mine if not _last_file(out, number, format).exists()]
    sizes = {number: len(_part(index, number)) for number in mine}
    done = sum(sizes.values()) - sum(sizes[number] for number in pending)
    if done:
        log.info("%d of %d shards are there", len(sizes) - len(pending), len(sizes))
    tracker = SkipTracker(index.images, max_bad_fraction, option="--max-bad-fraction")
    known: set[int] = set()
    _add_skipped(tracker, out, index, known, {})
    numbers = (number for shard in pending for number in _part(index, shard))
    decoded = in_threads(_reader(source, clip.preprocess), numbers, workers, batch_size)
    with ProgressBar("embedding", sum(sizes.values()), completed=done, is_silent=rank > 0) as bar:
        for shard in pending:
            ids, skipped, rows = [], {}, []
            for batch in _batches(decoded, sizes[shard], batch_size):
                good = [(n, pixels) for n, pixels in batch if isinstance(pixels, np.ndarray)]
                skipped |= {source.names[n]: str(e) for n, e in batch if isinstance(e, SampleError)}
                ids += [source.names[number] for number, _ in good]
                if good:
                    pixels = torch.from_numpy(np.stack([pixels for _, pixels in good]))
                    rows.append(clip.embed_pixels(pixels).numpy().astype(dtype))
                done += len(batch)
                bar.update(done)
            for name, reason in skipped.items():
                log.warning("skipped: %s: %s", escaped(name), escaped(reason))
            _add_skipped(tracker, out, index, known, skipped)
            _write(out, shard, index, ids, rows, skipped)
            _add_skipped(tracker, out, index, known, {})  # two ranks may end at once


def _add_skipped(
    tracker: SkipTracker, out: Path, index: Index, known: set[int], new: dict[str, str]
) -> None:
    """Count the skipped images of a new shard, and of the finished shards of all ranks.

    `known` holds the finished shards that are counted already.

    Raises:
        DataError: they are too many.
    """
    bad = dict(new)
    for path in out.glob("*.skipped.json"):
        shard = int(path.name.partition(".")[0].lstrip("_"))
        if shard not in known and _last_file(out, shard, index.format).exists():
            known.add(shard)
            bad |= _skipped(out, shard)
    tracker.add([Bad.of(name, SampleError("unreadable image", bad[name])) for name in bad])


def read_embeddings(folder: str | Path) -> tuple[list[str], np.ndarray]:
    """All ids and features (N, E) of a folder, in the order of the ids.

    Raises:
        ConfigError: it is no such folder.
        DataError: shards are missing; the command that makes them has not finished.
    """
    ids: list[str] = []
    rows: list[np.ndarray] = []
    for names, features in shards_of(folder):
        ids += names
        rows.append(features)
    return ids, np.concatenate(rows)


def shards_of(folder: str | Path) -> Iterator[tuple[list[str], np.ndarray]]:
    """The ids and features (n, E) of each shard; those of npy are mapped, not read.

    Raises:
        ConfigError: it is no such folder.
        DataError: shards are missing.
    """
    out = Path(folder)
    index = read_index(out)
    if missing := _missing(out, index):
        raise DataError(
            f"{out}: {len(missing)} of {index.shards} shards are missing, the first "
            f"{_last_file(out, missing[0], index.format).name}; run leanclip embed again"
        )
    for number in range(index.shards):
        path = _last_file(out, number, index.format)
        if index.format == "npy":
            yield json.loads(_ids_file(out, number).read_text()), np.load(path, mmap_mode="r")
        else:
            yield _read_parquet(path, index)


def read_index(out: Path) -> Index:
    """What a folder of embeddings is of.

    Raises:
        ConfigError: it is no such folder.
    """
    try:
        values = json.loads(index_file(out).read_text())
        return Index(**{field.name: values[field.name] for field in fields(Index)})
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{out}: no folder of embeddings: {error!r}") from None


def index_file(out: Path) -> Path:
    """What says what a folder is of; there, if it is one of embeddings."""
    return _note(out, "index.json")


def summary(out: Path) -> dict[str, Any]:
    """What there is by now, as plain values."""
    index = read_index(out)
    skipped = sum(len(_skipped(out, number)) for number in range(index.shards))
    return {
        "out": str(out),
        "images": index.images,
        "skipped": skipped,
        "shards": index.shards,
        "missing_shards": len(_missing(out, index)),
        "embed_dim": index.embed_dim,
        "format": index.format,
        "dtype": index.dtype,
    }


def _index(clip: InferenceModel, source: Source, shard_size: int, format: str, dtype: str) -> Index:
    if format not in FORMATS or dtype not in DTYPES:
        raise ConfigError(
            f"embed: found format {format} and dtype {dtype}; known are {', '.join(FORMATS)}, and "
            f"{', '.join(DTYPES)}"
        )
    if format == "parquet":
        _parquet()
    return Index(
        images=len(source.names),
        ids=source.digest(),
        weights=fingerprint(clip.model.state_dict()),
        embed_dim=clip.model.config.embed_dim,
        shard_size=shard_size,
        format=format,
        dtype=dtype,
    )


def _open(out: Path, index: Index) -> None:
    """Make the folder, or see that it is of the same."""
    if not index_file(out).exists():
        out.mkdir(parents=True, exist_ok=True)
        if any(path.suffix in (".npy", ".parquet") for path in out.iterdir()):
            raise ConfigError(f"{out}: holds files of something else; choose another --out")
        with atomic_write(index_file(out), by_several=True) as part:
            part.write_text(json.dumps(asdict(index), indent=1) + "\n")
        return
    there, here = asdict(read_index(out)), asdict(index)
    words = {"ids": "the images", "weights": "the weights", "images": "the number of images"}
    differing = [words.get(name, name) for name in here if there[name] != here[name]]
    if differing:
        raise ConfigError(
            f"{out}: was begun with other values of {', '.join(differing)}; choose another --out, "
            f"or remove it"
        )


def _part(index: Index, shard: int) -> range:
    """The numbers of the images of a shard."""
    first = shard * index.shard_size
    return range(first, min(first + index.shard_size, index.images))


def _reader(source: Source, preprocess: Preprocess):
    """What a thread does: an image's number and its pixels, or why there are none."""

    def read(_: int, number: int) -> tuple[int, np.ndarray | SampleError]:
        try:
            return number, evaluation_pixels(source.path(number), preprocess)
        except SampleError as error:
            return number, error

    return read


def _batches(decoded: Iterator, count: int, batch_size: int) -> Iterator[list]:
    """The next `count` of what is decoded, in batches."""
    for first in range(0, count, batch_size):
        yield list(islice(decoded, min(batch_size, count - first)))


def _write(
    out: Path,
    shard: int,
    index: Index,
    ids: list[str],
    rows: list[np.ndarray],
    skipped: dict[str, str],
) -> None:
    """The files of a shard, of which the last appears last and whole."""
    features = np.concatenate([np.empty((0, index.embed_dim), index.dtype), *rows])  # (n, E)
    _skipped_file(out, shard).unlink(missing_ok=True)  # of a start that was killed
    if skipped:
        write_text(_skipped_file(out, shard), json.dumps(skipped, indent=1) + "\n")
    last = _last_file(out, shard, index.format)
    if index.format == "npy":
        write_text(_ids_file(out, shard), json.dumps(ids))
        with atomic_write(last) as part:
            write_array(part, features)
        return
    pa, pq = _parquet()
    values = pa.FixedSizeListArray.from_arrays(pa.array(features.ravel()), index.embed_dim)
    texts = [os.fsencode(name).decode("utf-8", "backslashreplace") for name in ids]
    table = pa.table({"id": pa.array(texts, pa.string()), "embedding": values})
    if escaped := [row for row, text in enumerate(texts) if text != ids[row]]:
        table = table.replace_schema_metadata({_ESCAPED: json.dumps(escaped)})
    with atomic_write(last) as part:
        pq.write_table(table, part)


def _read_parquet(path: Path, index: Index) -> tuple[list[str], np.ndarray]:
    table = _parquet()[1].read_table(path)
    flat = table["embedding"].combine_chunks().flatten().to_numpy(zero_copy_only=False)
    ids = table["id"].to_pylist()
    for row in json.loads((table.schema.metadata or {}).get(_ESCAPED, b"[]")):
        content = re.sub(rb"\\x([89a-f][0-9a-f])", _byte, ids[row].encode())
        ids[row] = os.fsdecode(content)
    return ids, flat.reshape(-1, index.embed_dim)


def _byte(escape: re.Match[bytes]) -> bytes:
    return bytes.fromhex(escape[1].decode())


def _parquet() -> tuple[Any, Any]:
    import pyarrow  # takes 0.1 s
    import pyarrow.parquet

    return pyarrow, pyarrow.parquet


def _missing(out: Path, index: Index) -> list[int]:
    numbers = range(index.shards)
    return [number for number in numbers if not _last_file(out, number, index.format).exists()]


def _skipped(out: Path, shard: int) -> dict[str, str]:
    path = _skipped_file(out, shard)
    return json.loads(path.read_text()) if path.exists() else {}


def _last_file(out: Path, shard: int, format: str) -> Path:
    return out / f"{shard:05d}.{format}"


def _ids_file(out: Path, shard: int) -> Path:
    return out / f"{shard:05d}.ids.json"


def _skipped_file(out: Path, shard: int) -> Path:
    return _note(out, f"{shard:05d}.skipped.json")


def _note(out: Path, name: str) -> Path:
    """A file beside the shards: `_name`, which what reads a folder of Parquet passes over.

    Earlier releases wrote `name`, which is still read.
    """
    return out / name if (out / name).is_file() else out / f"_{name}"
