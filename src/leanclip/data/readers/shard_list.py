"""Which shards a root names, and how many samples each has.

    a folder | one .tar | a pattern {000..099} | URLs -> paths and URLs -> sizes

Sizes are read from the files beside the shards: `index.json` (leanclip data pack), `sizes.json`
(WebDataset, open_clip) or img2dataset's `<shard>_stats.json`. Without them shards are indexed.
"""

import itertools
import json
import logging
import math
import os
import re
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import ExitStack
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from leanclip.config.data import DataConfig
from leanclip.data.dataset import split_folder
from leanclip.data.readers.shard_cache import (
    beside,
    is_indexed,
    is_remote,
    read_file,
    shard_index,
    shard_name,
)
from leanclip.data.readers.tar_index import shard_warnings
from leanclip.errors import DataError
from leanclip.io.progress import ProgressBar

log = logging.getLogger("leanclip")

MAX_SHARDS = 1_000_000  # of a pattern
_RANGE = re.compile(r"(\d+)\.\.(\d+)")


def find_shards(config: DataConfig) -> list[str]:
    """The paths or URLs of the shards that `root` (and `split`) name, in order.

    Raises:
        DataError: there are none, one is missing, or it is not named as a tar file.
    """
    root = config.root
    if _scheme(root) is None and Path(root).is_dir():
        folder = split_folder(root, config.split)
        shards = sorted(str(path) for path in folder.glob("*.tar"))
        if not shards:
            raise DataError(f"{folder}: no shards (*.tar) found in it")
        index = folder / "index.json"
        for name in _read_sizes(str(index), _packed_sizes):
            if not (folder / name).is_file():
                raise DataError(f"{index}: lists {name}, which is not there; copy the rest too")
        return shards
    shards = expand(root)
    for shard in shards:
        _check(shard, config)
    return shards


def expand(pattern: str) -> list[str]:
    """The names that a pattern stands for: {000..099} counts, {a,b} lists.

    Raises:
        DataError: a brace that is neither, or over MAX_SHARDS names.
    """
    if Path(pattern).exists():
        return [pattern]
    parts = re.split(r"\{([^{}]*)\}", pattern)
    if any("{" in part or "}" in part for part in parts[::2]):
        raise DataError(f"data.root: {pattern}: nested or unbalanced braces")
    choices = [_choices(part, pattern) if i % 2 else [part] for i, part in enumerate(parts)]
    if math.prod(map(len, choices)) > MAX_SHARDS:
        raise DataError(f"data.root: {pattern}: stands for over {MAX_SHARDS:,} shards")
    return ["".join(chosen) for chosen in itertools.product(*choices)]


def stated_sizes(shards: Sequence[str]) -> list[int | None]:
    """The number of samples in each shard by the files beside it; None where none states it.

    Raises:
        DataError: such a file is damaged, or its server does not answer.
    """
    first_of = {beside(shard, ""): shard for shard in reversed(shards)}  # by folder
    tables = {
        folder: _read_sizes(beside(shard, "index.json"), _packed_sizes)
        or _read_sizes(beside(shard, "sizes.json"), dict)
        for folder, shard in first_of.items()
    }
    sizes = [tables[beside(shard, "")].get(shard_name(shard)) for shard in shards]
    lacking = [i for i, size in enumerate(sizes) if size is None]
    if lacking and _size_in_stats(shards[lacking[0]]) is not None:
        with ThreadPoolExecutor(16) as pool:  # for those on a server
            found = pool.map(_size_in_stats, [shards[i] for i in lacking])
            for i, size in zip(lacking, found, strict=True):
                sizes[i] = size
    return sizes


def count_samples(shards: Sequence[str], limit: float) -> list[int]:
    """The number of samples in each shard by its index; what is odd about them is logged.

    Args:
        shards: paths or URLs.
        limit: bytes of all fetched shards.

    Raises:
        DataError: one cannot be fetched or read.
    """
    new = [shard for shard in shards if is_remote(shard) or not is_indexed(shard)]
    with ExitStack() as stack:
        indexing = (_size(shard, limit) for shard in new)
        if any(map(is_remote, new)):
            log.info("no file beside the shards states their sizes: all are fetched")
        elif len(new) > 1:
            # Forked before the progress bar starts its thread.
            workers = min(len(os.sched_getaffinity(0)), len(new))
            pool = stack.enter_context(ProcessPoolExecutor(workers, get_context("fork")))
            indexing = pool.map(_size, new, itertools.repeat(limit), chunksize=4)
        bar = stack.enter_context(ProgressBar("indexing shards", len(new)))
        for done, _ in enumerate(indexing, 1):
            bar.update(done)
    for line in shard_warnings(
        (shard, shard_index(shard)) for shard in shards if not is_remote(shard)
    ):
        log.warning("%s: %s", Path(shards[0]).parent if len(shards) > 1 else shards[0], line)
    return [_size(shard, limit) for shard in shards]


def _size(shard: str, limit: float) -> int:
    try:
        return len(shard_index(shard, limit))
    except OSError as error:
        raise DataError(f"{shard}: cannot be read: {error.strerror}") from None


def _check(shard: str, config: DataConfig) -> None:
    """Refuse anything but a tar file by path or URL."""
    scheme = _scheme(shard)
    if scheme is not None and not is_remote(shard):
        raise DataError(
            f"data.root: {shard}: {scheme} is not supported; give paths, or http and https URLs "
            f"(leanclip runs no commands to get data)"
        )
    name = shard_name(shard)
    if name.endswith((".gz", ".tgz", ".bz2", ".xz", ".zst")):
        raise DataError(f"data.root: {shard}: a compressed tar has no random access; unpack it")
    if scheme is None and not Path(shard).exists():
        what = "such shard" if name.endswith(".tar") else "such folder or shard"
        raise DataError(f"data.root: no {what}: {shard}")
    if not name.endswith(".tar"):
        raise DataError(f"data.root: {shard}: is not a shard (.tar), a folder or a pattern of them")
    if config.split is not None:
        raise DataError(
            f"data.split: {config.split}: goes with a folder of folders of shards; "
            f"data.root is {config.root}"
        )


def _scheme(root: str) -> str | None:
    """What precedes the colon of a URL; None of a path."""
    found = re.match(r"(pipe|[A-Za-z][A-Za-z0-9+.-]*(?=://)):", root)
    return found[1] + ":" if found else None


def _choices(inner: str, pattern: str) -> Sequence[str]:
    """What a pair of braces stands for."""
    if found := _RANGE.fullmatch(inner):
        first, last = found.groups()
        if int(last) < int(first):
            raise DataError(f"data.root: {pattern}: {{{inner}}} is empty; write the smaller first")
        if int(last) - int(first) >= MAX_SHARDS:
            raise DataError(f"data.root: {pattern}: stands for over {MAX_SHARDS:,} shards")
        is_padded = first.startswith("0") or last.startswith("0")
        width = max(len(first), len(last)) if is_padded else 0
        return [f"{number:0{width}d}" for number in range(int(first), int(last) + 1)]
    if "," in inner:
        return inner.split(",")
    raise DataError(f"data.root: {pattern}: {{{inner}}} is neither {{000..099}} nor {{a,b}}")


def _size_in_stats(shard: str) -> int | None:
    """What img2dataset notes of one shard."""
    stats = beside(shard, f"{shard_name(shard).removesuffix('.tar')}_stats.json")
    return _read_sizes(stats, lambda facts: {"": facts["successes"]}).get("")


def _packed_sizes(facts: dict[str, Any]) -> dict[str, int]:
    """Sizes in the index of `leanclip data pack`; none in another file of that name."""
    if "shards" not in facts:
        return {}
    if facts["format"] != 1:
        raise ValueError
    return {entry["name"]: entry["samples"] for entry in facts["shards"]}


def _read_sizes(path: str, sizes_in: Callable[[dict[str, Any]], dict[str, int]]) -> dict[str, int]:
    """Sizes by shard from a JSON file by path or URL; none if there is no such file.

    Raises:
        DataError: it has another content.
    """
    content = read_file(path)
    if content is None:
        return {}
    try:
        sizes = sizes_in(json.loads(content))
        if not all(isinstance(name, str) for name in sizes):
            raise ValueError
        if not all(type(size) is int and 0 <= size < 1 << 40 for size in sizes.values()):
            raise ValueError
    except (ValueError, KeyError, TypeError, RecursionError):
        raise DataError(f"{path}: does not hold the sizes of shards; mend or remove it") from None
    return sizes
