"""The samples in a tar shard and where their bytes are: an array in the cache, one row per sample.

    tar -> headers, by the standard library -> members by key -> rows of offsets and sizes -> .npy

Nothing is extracted. As in WebDataset, the path up to the first dot of the file name is the key of
a sample, and the rest says what a member is. Where this gives no complete sample, the key ends at
the last dot. Members that are not read are counted by name in the rows.
"""

import logging
import re
import tarfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from leanclip.errors import escaped, is_shortage
from leanclip.preprocess.image_formats import SUFFIXES

log = logging.getLogger("leanclip")

_COMMON = ("jpg", "jpeg", "png", "webp", "bmp", "gif", "tif", "tiff")
# In this order: a sample with several images has the first.
IMAGES = (*_COMMON, *sorted({suffix[1:] for suffix in SUFFIXES} - {*_COMMON}))
TEXTS = ("txt", "json", "cls")
PARTS = ("image", *TEXTS)
PROBLEMS = (  # by their number in an index; 0: none
    "",
    "unsafe member name",
    "duplicate member",
    "truncated shard",
    "not a tar file",
    "unknown extension",
)
_READ = frozenset((*IMAGES, *TEXTS))
_DOCUMENTS = ("md", "rst", "html", "pdf", "csv", "tsv", "parquet", "yaml", "yml", "toml", "ini",
              "log", "db", "py", "sh")  # beside samples  # fmt: skip
_EXAMPLES = 5  # names in a warning
_MAX_KEY_BYTES = 255  # of a key in the index
_BLOCK = 512  # bytes of a tar's block
_MAX_PAX_BYTES, _MAX_PAX_HEADERS = 1 << 16, 1000
_DIGITS = re.compile(rb"[0-9]{300}")
_DAMAGE = (tarfile.TarError, ValueError, LookupError, OverflowError, RecursionError, MemoryError)
_KEY = re.compile(r"((?:.*/|)[^./][^/.]*)[.]([^/]*)", re.DOTALL)  # up to the first dot, the rest


def build_index(path: Path) -> np.ndarray:
    """Read the headers of a shard; damage is logged and becomes a row with a problem.

    Returns:
        Rows of `key` (bytes), `problem` (index into PROBLEMS) and, for each of PARTS, `<part>` and
        `<part>_size`: offset in the file and length in bytes; 0: there is none. `unread` has the
        names of members that are not read, joined by `/` and possibly cut, and `unread_count`
        their number. `is_apart`: other members stand between those of this sample.

    Raises:
        OSError: the shard cannot be read.
    """
    with path.open("rb") as file:
        members = list(_members(path, file))
    cut = members.pop() if members and members[-1].problem == "truncated shard" else None
    samples = _samples(members)
    if cut and samples and (not samples[-1].is_complete or samples[-1].key == cut.key):
        samples[-1].problem = cut.problem
    elif cut and cut.key:
        samples.append(_Sample(cut.key, problem=cut.problem))
    # Those of unknown extensions come last: sizes stated beside a shard do not count them.
    samples.sort(key=lambda sample: sample.problem == "unknown extension")
    keys = [_cut_key(_encode(sample.key), i) for i, sample in enumerate(samples)]
    unread = [_encode("/".join(sample.unread))[:_MAX_KEY_BYTES] for sample in samples]
    key_width, unread_width = (max(map(len, texts), default=0) or 1 for texts in (keys, unread))
    places = [(part, "u8") for name in PARTS for part in (name, f"{name}_size")]
    names = [("unread", f"S{unread_width}"), ("unread_count", "u4"), ("is_apart", "?")]
    index = np.zeros(len(samples), [("key", f"S{key_width}"), ("problem", "u1"), *places, *names])
    index["key"], index["unread"] = keys, unread
    index["problem"] = [PROBLEMS.index(sample.problem) for sample in samples]
    index["unread_count"] = [len(sample.unread) for sample in samples]
    index["is_apart"] = [sample.is_apart for sample in samples]
    for part in PARTS:
        found = [sample.parts.get(part, (0, 0)) for sample in samples]
        index[part], index[f"{part}_size"] = zip(*found, strict=True) if found else ((), ())
    return index


def decoded(name: bytes) -> str:
    """A `key`, or the names in `unread`, which may not be UTF-8."""
    return name.decode("utf-8", "surrogateescape")


def shard_warnings(indices: Iterable[tuple[str, np.ndarray]]) -> list[str]:
    """Warnings, one per line, on members that are not read and members that stand apart.

    Args:
        indices: names of shards and their rows.
    """
    unread, apart = 0, 0
    names, examples = Counter[str](), list[str]()
    for shard, rows in indices:
        unread += int(rows["unread_count"].sum())
        for joined in rows["unread"][rows["unread_count"] > 0]:
            names.update(decoded(joined).split("/"))
        keys = rows["key"][rows["is_apart"]]
        apart += len(keys)
        examples += [f"{shard}/{decoded(key)}" for key in keys[: _EXAMPLES - len(examples)]]
    lines = []
    if unread:
        listed = ", ".join(f"{n:,} {escaped(name)}" for name, n in names.most_common(_EXAMPLES))
        more = ", ..." if len(names) > _EXAMPLES or names.total() < unread else ""
        lines.append(f"members that are not read: {unread:,} ({listed}{more})")
    if apart:
        listed = ", ".join(map(escaped, examples)) + ", ..." * (apart > len(examples))
        lines.append(
            f"samples whose members are not next to each other in the tar: {apart:,} ({listed}); "
            f"other readers of WebDataset lose them: pack again, or use tar --sort=name"
        )
    return lines


class _Member(NamedTuple):
    """A member named `key.rest`."""

    key: str  # empty: it belongs to no sample
    rest: str
    offset: int = 0
    size: int = 0
    problem: str = ""

    @property
    def stem(self) -> str:
        """The name up to the last dot."""
        return f"{self.key}.{self.rest}".rpartition(".")[0]

    @property
    def suffix(self) -> str:
        """What follows the last dot."""
        return self.rest.rpartition(".")[2].lower()


@dataclass
class _Group:
    """Members with the same key."""

    key: str
    members: list[_Member] = field(default_factory=list)
    extensions: set[str] = field(default_factory=set)
    is_apart: bool = False  # other members stand between them


@dataclass
class _Sample:
    """A row of the index."""

    key: str
    problem: str = ""
    is_apart: bool = False
    parts: dict[str, tuple[int, int]] = field(default_factory=dict)  # offset and size
    unread: list[str] = field(default_factory=list)

    @property
    def is_complete(self) -> bool:
        """Whether it has an image, and a caption or a label."""
        return "image" in self.parts and not self.parts.keys().isdisjoint(TEXTS)


def _sample(group: _Group, key: str, extensions: Mapping[str, Sequence[_Member]]) -> _Sample:
    """A sample of members of a group by their extensions under this key."""
    sample = _Sample(key, is_apart=group.is_apart)
    for extension, members in extensions.items():
        problems = [member.problem for member in members if member.problem]
        if problems or (extension in _READ and len(members) > 1):
            sample.problem = problems[0] if problems else "duplicate member"
        elif extension in _READ:
            sample.parts[extension] = members[0].offset, members[0].size
        else:
            sample.unread += ["." + member.rest[-len(extension) :] for member in members]
    for extension in reversed(IMAGES):
        if extension in sample.parts:
            sample.parts["image"] = sample.parts[extension]
    return sample


def _samples(members: Sequence[_Member]) -> list[_Sample]:
    """Samples in the order of their first members.

    Files that belong to no sample, such as `README.md`, are listed with one that lacks nothing.
    """
    strays = [member.rest for member in members if not member.key]
    samples: list[_Sample] = []
    for group in _groups(member for member in members if member.key):
        for sample in _split(group):
            if not sample.parts and not sample.problem:
                if all(name.rpartition(".")[2].lower() in _DOCUMENTS for name in sample.unread):
                    strays += [f"{sample.key}{name}" for name in sample.unread]
                    continue
                sample.problem = "unknown extension"
            samples.append(sample)
    if strays and not samples:
        samples.append(_Sample("the whole file", problem="unknown extension"))
    if strays:
        next((one for one in reversed(samples) if one.is_complete), samples[-1]).unread += strays
    return samples


def _groups(members: Iterable[_Member]) -> list[_Group]:
    """Members by key.

    A key that returns continues its group, or begins another where that has the extension already.
    """
    groups: list[_Group] = []
    latest: dict[str, _Group] = {}
    previous = None
    for member in members:
        group, extension = latest.get(member.key), member.rest.lower()
        if group is None or (group is not previous and extension in group.extensions):
            group = latest[member.key] = _Group(member.key)
            groups.append(group)
        group.is_apart |= bool(group.members) and group is not previous
        group.members.append(member)
        group.extensions.add(extension)
        previous = group
    return groups


def _split(group: _Group) -> list[_Sample]:
    """The samples of one key: one, as in WebDataset, unless names have more dots than one.

    `photo 1.5 of me.jpg` and `photo 1.5 of me.txt` have the key `photo 1` and no known extension
    there. Such members are grouped by their names up to the last dot.
    """
    members = group.members
    sample = _sample(group, group.key, _by(members, lambda one: one.rest.lower()))
    if sample.is_complete or not any("." in one.rest and one.suffix in _READ for one in members):
        return [sample]
    samples = [
        _sample(group, stem, _by(same, lambda one: one.suffix))
        for stem, same in _by(members, lambda one: one.stem).items()
    ]
    # `a.in.png` and `a.out.txt` are parts of one sample that is not read.
    is_one = len({one.suffix for one in members}) == len(members)
    return [sample] if is_one and not any(one.is_complete for one in samples) else samples


def _by(
    members: Iterable[_Member], name: Callable[[_Member], str]
) -> Mapping[str, Sequence[_Member]]:
    """Members by name, in order."""
    found: dict[str, list[_Member]] = {}
    for member in members:
        found.setdefault(name(member), []).append(member)
    return found


class _BoundedHeader(tarfile.TarInfo):
    """A header whose pax records are limited.

    Before Python 3.11.10 and 3.12.6 the standard library takes quadratic time over their digits
    (CVE-2024-6232), and in every version over many global records.
    """

    def _proc_pax(self, tarfile_: tarfile.TarFile) -> tarfile.TarInfo:
        file: Any = tarfile_.fileobj
        place = file.tell()
        records = file.read(min(max(self.size, 0), _MAX_PAX_BYTES + 1))
        file.seek(place)
        if (
            len(records) > _MAX_PAX_BYTES
            or len(tarfile_.pax_headers) > _MAX_PAX_HEADERS
            or _DIGITS.search(records)
        ):
            raise tarfile.ReadError("pax records over the limit")
        return super()._proc_pax(tarfile_)  # pyright: ignore[reportAttributeAccessIssue]


def _members(path: Path, file: BinaryIO) -> Iterator[_Member]:
    """The members except folders; the last one of a cut shard has the problem "truncated shard"."""
    try:
        tar = tarfile.open(fileobj=file, mode="r:", tarinfo=_BoundedHeader)  # noqa: SIM115
    except _DAMAGE as error:
        if is_shortage(error):
            raise
        log.warning("%s: is not a tar file, or a compressed one", path)
        yield _Member("the whole file", "", problem="not a tar file")
        return
    end, length = 0, path.stat().st_size
    try:
        while (info := tar.next()) is not None:
            tar.members = []  # pyright: ignore[reportAttributeAccessIssue]: it keeps them all
            if info.size < 0 or tar.offset <= end:  # headers that form a circle
                break
            end = tar.offset
            if info.isdir():
                continue
            member = _member(info)
            if member.offset + member.size > length:
                log.warning(
                    "%s: ends within %s; what precedes it is used", path, escaped(info.name)
                )
                yield _Member(member.key or info.name, member.rest, problem="truncated shard")
                return
            yield member
    except _DAMAGE as error:
        if is_shortage(error):
            raise
    file.seek(end)
    block = file.read(_BLOCK)
    if block != bytes(_BLOCK):  # two blocks of zeros end a tar
        log.warning("%s: is cut or damaged at byte %d; what precedes it is used", path, end)
        yield _Member(f"byte {end}" if block else "", "", problem="truncated shard")


def _member(info: tarfile.TarInfo) -> _Member:
    """A member that is no folder."""
    found = _KEY.fullmatch(info.name)
    key, rest = found.groups() if found else ("", info.name.rpartition("/")[2])
    if info.name.startswith("/") or ".." in info.name.split("/"):
        return _Member(key or info.name, rest, problem="unsafe member name")
    if not info.isreg() or info.issparse():
        kind = "a link" if info.issym() or info.islnk() else "not a file"
        return _Member(key, f"{rest} ({kind})")
    if key.startswith("__"):  # WebDataset's own metadata
        return _Member("", info.name.rpartition("/")[2])
    return _Member(key, rest, info.offset_data, info.size)


def _encode(text: str) -> bytes:
    return text.encode("utf-8", "surrogateescape")


def _cut_key(key: bytes, number: int) -> bytes:
    """A key of at most _MAX_KEY_BYTES, different from all others."""
    return key if len(key) <= _MAX_KEY_BYTES else key[: _MAX_KEY_BYTES - 12] + b"~%d" % number
