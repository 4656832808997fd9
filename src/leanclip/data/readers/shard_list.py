"""Which shards a root names, and how many samples each has.

    a folder | one .tar | a pattern {000..099} | URLs -> paths and URLs -> sizes

Sizes are read from what lies beside the shards: `index.json` (leanclip data pack), `sizes.json`
(WebDataset, open_clip) or img2dataset's `<shard>_stats.json`.
"""

import itertools
import json
import math
import re
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from leanclip.config.data import DataConfig
from leanclip.data.dataset import split_folder
from leanclip.errors import DataError

MAX_SHARDS = 1_000_000  # that a pattern may name
URLS = ("http://", "https://")
_RANGE = re.compile(r"(\d+)\.\.(\d+)")


def find_shards(config: DataConfig) -> list[str]:
    """The paths or URLs of the shards that `root` (and `split`) name, in order.

    Raises:
        DataError: there are none, one is not there, or it is not a tar file's name.
    """
    root = config.root
    if _scheme(root) is None and Path(root).is_dir():
        folder = split_folder(root, config.split)
        shards = sorted(str(path) for path in folder.glob("*.tar"))
        if not shards:
            raise DataError(f"{folder}: no shards (*.tar) found in it")
        index = folder / "index.json"
        for name in _read_sizes(str(index), read_local, _packed_sizes):
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
        DataError: a brace that is neither, or too many names.
    """
    if Path(pattern).exists():
        return [pattern]
    parts = re.split(r"\{([^{}]*)\}", pattern)
    choices: list[Sequence[str]] = [
        _choices(part, pattern) if i % 2 else [part] for i, part in enumerate(parts)
    ]
    if any("{" in part or "}" in part for part in parts):
        raise DataError(f"data.root: {pattern}: braces within braces, or one without the other")
    if math.prod(map(len, choices)) > MAX_SHARDS:
        raise DataError(f"data.root: {pattern}: stands for over {MAX_SHARDS:,} shards")
    return ["".join(chosen) for chosen in itertools.product(*choices)]


def stated_sizes(shards: Sequence[str], read: Callable[[str], bytes | None]) -> list[int | None]:
    """How many samples each shard has, by what lies beside it; None where nothing says so.

    Args:
        shards: paths or URLs.
        read: gives the content of a path or URL; None: there is no such file.

    Raises:
        DataError: a file of sizes is damaged, or names a shard that is not there.
    """
    tables: dict[str, dict[str, int]] = {}
    folders = [beside(shard, "") for shard in shards]
    for shard, folder in zip(shards, folders, strict=True):
        if folder not in tables:
            tables[folder] = _table(shard, read)
    sizes = [tables[f].get(shard_name(s)) for s, f in zip(shards, folders, strict=True)]
    lacking = [i for i, size in enumerate(sizes) if size is None]
    if lacking and shards[lacking[0]].startswith(URLS):  # if the first has none, why ask for others
        first = lacking.pop(0)
        sizes[first] = _own_size(shards[first], read)
        lacking = lacking if sizes[first] is not None else []
    with ThreadPoolExecutor(16) as pool:
        found = pool.map(lambda shard: _own_size(shard, read), [shards[i] for i in lacking])
        for i, size in zip(lacking, found, strict=True):
            sizes[i] = size
    return sizes


def read_local(path: str) -> bytes | None:
    """A file's content; None where there is none."""
    return Path(path).read_bytes() if Path(path).is_file() else None


def beside(shard: str, name: str) -> str:
    """The path or URL of another file in a shard's folder."""
    address, mark, query = shard.partition("?") if shard.startswith(URLS) else (shard, "", "")
    folder, slash, _ = address.rpartition("/")
    return f"{folder}{slash}{name}{mark}{query}"


def shard_name(shard: str) -> str:
    """The last part of a path or URL."""
    address = shard.partition("?")[0] if shard.startswith(URLS) else shard
    return address.rpartition("/")[2]


def _check(shard: str, config: DataConfig) -> None:
    """Refuse what is no tar file that may be read."""
    scheme = _scheme(shard)
    if scheme is not None and not shard.startswith(URLS):
        raise DataError(
            f"data.root: {shard}: {scheme} is not read; give paths, or http and https addresses "
            f"(leanclip runs no commands to get data)"
        )
    name = shard_name(shard)
    if name.endswith((".gz", ".tgz", ".bz2", ".xz", ".zst")):
        raise DataError(f"data.root: {shard}: a compressed tar cannot be read at any place; unpack")
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
    """What comes before `:` in an address; None of a path."""
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
        padded = first.startswith("0") or last.startswith("0")
        width = max(len(first), len(last)) if padded else 0
        return [f"{number:0{width}d}" for number in range(int(first), int(last) + 1)]
    if "," in inner:
        return inner.split(",")
    raise DataError(f"data.root: {pattern}: {{{inner}}} is neither {{000..099}} nor {{a,b}}")


def _table(shard: str, read: Callable[[str], bytes | None]) -> dict[str, int]:
    """Sizes by name, of all shards in the folder of one."""
    table = _read_sizes(beside(shard, "index.json"), read, _packed_sizes)
    return table or _read_sizes(beside(shard, "sizes.json"), read, dict)


def _own_size(shard: str, read: Callable[[str], bytes | None]) -> int | None:
    """What img2dataset notes of one shard."""
    stats = beside(shard, f"{shard_name(shard).removesuffix('.tar')}_stats.json")
    return _read_sizes(stats, read, lambda facts: {"": facts["successes"]}).get("")


def _packed_sizes(facts: dict[str, Any]) -> dict[str, int]:
    """Sizes in what `leanclip data pack` writes; none in what has the same name by chance."""
    if "shards" not in facts:
        return {}
    if facts["format"] != 1:
        raise ValueError
    return {entry["name"]: entry["samples"] for entry in facts["shards"]}


def _read_sizes(
    path: str,
    read: Callable[[str], bytes | None],
    sizes_in: Callable[[dict[str, Any]], dict[str, int]],
) -> dict[str, int]:
    """Sizes by name from a JSON file; none where there is no such file.

    Raises:
        DataError: it does not hold what it should.
    """
    content = read(path)
    if content is None:
        return {}
    try:
        sizes = sizes_in(json.loads(content))
        if not all(isinstance(name, str) and "/" not in name for name in sizes):
            raise ValueError
        if not all(type(size) is int and 0 <= size < 1 << 40 for size in sizes.values()):
            raise ValueError
    except (ValueError, KeyError, TypeError, RecursionError):
        raise DataError(f"{path}: does not hold the sizes of shards; mend or remove it") from None
    return sizes
