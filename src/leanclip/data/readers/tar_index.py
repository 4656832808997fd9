"""What a tar shard holds and where, found once and kept: nothing is ever extracted from it.

    tar -> headers, through the standard library -> a row per sample: offsets and sizes -> .npy

WebDataset's rule says what a sample is: consecutive members whose paths are the same up to the
first dot of the last name; what follows the dot says what a member is. Where that leaves nothing,
names are taken up to the last dot, and members of one sample may be apart. What is not read is
counted in the rows, with its name.
"""

import logging
import re
import tarfile
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from leanclip.data.readers.cached import cached, cached_path
from leanclip.errors import escaped, is_shortage
from leanclip.io.files import write_array
from leanclip.preprocess.image_formats import SUFFIXES

log = logging.getLogger("leanclip")

_USUAL = ("jpg", "jpeg", "png", "webp", "bmp", "gif", "tif", "tiff")
IMAGES = (*_USUAL, *sorted({suffix[1:] for suffix in SUFFIXES} - {*_USUAL}))  # the first counts
PARTS = ("image", "txt", "json", "cls")
PROBLEMS = (  # by their number in an index; 0: none
    "",
    "unsafe member name",
    "duplicate member",
    "truncated shard",
    "not a tar file",
    "unknown extension",
)
_KNOWN = frozenset((*IMAGES, *PARTS[1:]))
_DOCUMENTS = ("md", "rst", "html", "pdf", "csv", "tsv", "parquet", "yaml", "yml", "toml", "ini",
              "log", "db", "py", "sh")  # beside samples, not of one  # fmt: skip
_KIND = f"npy-{'-'.join(IMAGES)}"  # what is read depends on what Pillow has
_EXAMPLES = 5  # names in a message
_MAX_KEY_BYTES = 255  # bytes that are kept of one
_BLOCK = 512  # of a tar
_MAX_PAX_BYTES, _MAX_PAX_HEADERS = 1 << 16, 1000  # bytes of a header's, number of all members'
_DIGITS = re.compile(rb"[0-9]{300}")  # more than a file's name can have
_DAMAGE = (tarfile.TarError, ValueError, LookupError, OverflowError, RecursionError, MemoryError)
_KEY = re.compile(r"((?:.*/|)[^./][^/.]*)[.]([^/]*)", re.DOTALL)  # path to the first dot, the rest


def shard_index(path: Path, identity: str | None = None) -> np.ndarray:
    """The samples of a shard, from the cache where it has been looked through before.

    Args:
        path: a tar file.
        identity: as of `cached`.

    Returns:
        Rows of `key` (bytes), `problem` (index into PROBLEMS) and, for each of PARTS, `<part>`
        and `<part>_size`: where its data begins in the file, and how long it is; 0: not there.
        Also the names of members that are not read (`unread`, with `/` between; `unread_count`),
        and whether members of this key stand in several places (`is_apart`).

    Raises:
        DataError: the cache folder cannot be written.
        OSError: the shard cannot be read.
    """
    return cached(
        [path], _KIND, lambda part: write_array(part, build_index(path)), _load, identity=identity
    )


@dataclass
class Remarks:
    """What is odd about shards, though it is no fault of one sample."""

    unread: int = 0  # members
    names: Counter[str] = field(default_factory=Counter)  # of these, from their first dot on
    apart: int = 0  # samples whose members are not neighbours
    examples: tuple[str, ...] = ()  # of these

    @classmethod
    def of(cls, shard: str, rows: np.ndarray) -> "Remarks":
        """Of the rows of a shard."""
        names = Counter[str]()
        for one in rows["unread"][rows["unread_count"] > 0]:
            names.update(escaped(one.decode("utf-8", "surrogateescape")).split("/"))
        apart = rows["key"][rows["is_apart"]]
        examples = [escaped(key.decode("utf-8", "surrogateescape")) for key in apart[:_EXAMPLES]]
        common = Counter(dict(names.most_common(2 * _EXAMPLES)))
        unread = int(rows["unread_count"].sum())
        return cls(unread, common, len(apart), tuple(f"{escaped(shard)}/{key}" for key in examples))

    def __add__(self, other: "Remarks") -> "Remarks":
        return Remarks(
            self.unread + other.unread,
            self.names + other.names,
            self.apart + other.apart,
            (self.examples + other.examples)[:_EXAMPLES],
        )

    def lines(self) -> list[str]:
        """For a person; none where nothing is odd."""
        lines = []
        if self.unread:
            listed = [f"{count:,} {name}" for name, count in self.names.most_common(_EXAMPLES)]
            more = ", ..." if sum(self.names.values()) < self.unread else ""
            more = more or ", ..." * (len(self.names) > _EXAMPLES)
            lines.append(f"members that are not read: {self.unread:,} ({', '.join(listed)}{more})")
        if self.apart:
            more = ", ..." * (self.apart > len(self.examples))
            lines.append(
                f"samples whose members are not next to each other in the tar: {self.apart:,} "
                f"({', '.join(self.examples)}{more}); other readers of WebDataset lose them: pack "
                f"again, or use tar --sort=name"
            )
        return lines


def is_indexed(path: Path) -> bool:
    """Whether a shard has been looked through before."""
    return cached_path([path], _KIND).is_file()


def _load(kept: Path) -> np.ndarray | None:
    """An index; None of what a crash or a full disk left of one."""
    index = np.load(kept, mmap_mode="r" if kept.stat().st_size > 1 << 16 else None)
    return index if isinstance(index, np.ndarray) and index.dtype.names else None


def build_index(path: Path) -> np.ndarray:
    """Look through a shard; what is wrong with it is a row with a problem, and a warning."""
    with path.open("rb") as file:
        members = list(_members(path, file))
    cut = members.pop() if members and members[-1].problem == "truncated shard" else None
    rows = _rows(members)
    if cut and rows and (not rows[-1].is_whole() or rows[-1].key == cut.key):
        rows[-1].problem = cut.problem
    elif cut and cut.key:
        rows += _split([cut], is_apart=False)
    # Last, as nothing that states how many samples there are counts them.
    rows.sort(key=lambda row: row.problem == "unknown extension")
    keys = [_short(row.key.encode("utf-8", "surrogateescape"), i) for i, row in enumerate(rows)]
    names = ["/".join(row.unread).encode("utf-8", "surrogateescape") for row in rows]
    names = [name[:_MAX_KEY_BYTES] for name in names]
    fields = [field for part in PARTS for field in ((part, "u8"), (f"{part}_size", "u8"))]
    width, names_width = (max(map(len, texts), default=0) or 1 for texts in (keys, names))
    fields += [("unread", f"S{names_width}"), ("unread_count", "u4"), ("is_apart", "?")]
    index = np.zeros(len(rows), [("key", f"S{width}"), ("problem", "u1"), *fields])
    index["key"], index["unread"] = keys, names
    index["problem"] = [PROBLEMS.index(row.problem) for row in rows]
    index["unread_count"] = [len(row.unread) for row in rows]
    index["is_apart"] = [row.is_apart for row in rows]
    for part in PARTS:
        places = [row.place(part) for row in rows]
        index[part] = [offset for offset, _ in places]
        index[f"{part}_size"] = [size for _, size in places]
    return index


class _Member(NamedTuple):
    """A member of a tar: `key.rest`, where its data is, and what is wrong with it."""

    key: str  # none: no sample's
    rest: str
    offset: int = 0
    size: int = 0
    problem: str = ""

    @property
    def stem(self) -> str:
        """The name up to its last dot."""
        return f"{self.key}.{self.rest}".rpartition(".")[0]

    @property
    def suffix(self) -> str:
        """What follows the last dot."""
        return self.rest.rpartition(".")[2].lower()


_CUT = _Member("", "", problem="truncated shard")  # where a shard ends between two members


class _Row:
    """One sample: members by extension; those of other extensions are not read."""

    def __init__(self, key: str, members: Iterable[tuple[str, _Member]], is_apart: bool) -> None:
        self.key, self.problem, self.is_apart = key, "", is_apart
        self.members: dict[str, tuple[int, int]] = {}
        self.unread: list[str] = []
        for extension, member in members:
            if member.problem:
                self.problem = member.problem
            elif extension not in _KNOWN:
                self.unread.append("." + member.rest[-len(extension) :])
            else:
                if extension in self.members:
                    self.problem = "duplicate member"
                self.members[extension] = member.offset, member.size

    def is_whole(self) -> bool:
        """Whether it has an image and something that says what is on it."""
        return self.place("image") != (0, 0) and any(part in self.members for part in PARTS[1:])

    def place(self, part: str) -> tuple[int, int]:
        names = IMAGES if part == "image" else (part,)
        return next((self.members[name] for name in names if name in self.members), (0, 0))


def _rows(members: Iterable[_Member]) -> list[_Row]:
    """The samples, in the order of their first members; one also has the names of no sample."""
    groups: list[list[_Member]] = []  # neighbours of one key
    strays: list[str] = []
    for member in members:
        if not member.key:
            strays.append(member.rest)
        elif groups and groups[-1][0].key == member.key:
            groups[-1].append(member)
        else:
            groups.append([member])
    rows: list[_Row] = []
    for group, is_apart in _joined(groups):
        for row in _split(group, is_apart=is_apart):
            if not row.members and not row.problem:
                if all(name.rpartition(".")[2].lower() in _DOCUMENTS for name in row.unread):
                    strays += [f"{row.key}{name}" for name in row.unread]
                    continue
                row.problem = "unknown extension"
            rows.append(row)
    if strays and not rows:
        rows = [_Row("the whole file", (), is_apart=False)]
        rows[0].problem = "unknown extension"
    if strays:  # where they do not look like parts of a sample that lacks something
        next((row for row in reversed(rows) if row.is_whole()), rows[-1]).unread += strays
    return rows


def _joined(groups: Sequence[list[_Member]]) -> Iterator[tuple[list[_Member], bool]]:
    """Members of one key that are not neighbours, as one sample if they complete each other.

    Gives each group, and whether its key stands in another place too without being a sample there.
    """
    by_key: dict[str, list[list[_Member]]] = {}
    for group in groups:
        by_key.setdefault(group[0].key, []).append(group)
    for group in groups:
        same = by_key[group[0].key]
        if len(same) == 1 or all(map(_is_whole, same)):
            yield group, False
        elif not _are_disjoint(same):
            yield group, not _is_whole(group)
        elif group is same[0]:
            yield [member for one in same for member in one], True


def _are_disjoint(groups: Sequence[list[_Member]]) -> bool:
    """Whether no extension is in two groups, and no member has a problem."""
    members = [member for group in groups for member in group]
    extensions = {member.rest.lower() for member in members}
    return len(extensions) == len(members) and not any(member.problem for member in members)


def _is_whole(group: Sequence[_Member]) -> bool:
    extensions = {member.rest.lower() for member in group}
    return not extensions.isdisjoint(IMAGES) and not extensions.isdisjoint(PARTS[1:])


def _split(group: Sequence[_Member], *, is_apart: bool) -> list[_Row]:
    """The samples of the members of one key, whose names may have more dots than one.

    By WebDataset's rule there is one. Where that one is not whole, members that are the same up to
    the last dot are samples: `photo 1.5 of me.jpg` and `.txt`, of which that rule leaves nothing.
    """
    row = _Row(group[0].key, ((member.rest.lower(), member) for member in group), is_apart)
    if row.is_whole() or not any("." in m.rest and m.suffix in _KNOWN for m in group):
        return [row]
    by_stem: dict[str, list[_Member]] = {}
    for member in group:
        by_stem.setdefault(member.stem, []).append(member)
    rows = [_Row(s, ((m.suffix, m) for m in same), is_apart) for s, same in by_stem.items()]
    is_one = len({member.suffix for member in group}) == len(group)
    return [row] if is_one and not any(one.is_whole() for one in rows) else rows


class _Header(tarfile.TarInfo):
    """A member's header, whose notes (pax) are within reason.

    The standard library takes quadratic time over digits in them, in some versions, and over many
    notes that hold for all members.
    """

    def _proc_pax(self, tarfile_: tarfile.TarFile) -> tarfile.TarInfo:
        file: Any = tarfile_.fileobj
        place = file.tell()
        notes = file.read(min(max(self.size, 0), _MAX_PAX_BYTES + 1))
        file.seek(place)
        if (
            len(notes) > _MAX_PAX_BYTES
            or len(tarfile_.pax_headers) > _MAX_PAX_HEADERS
            or _DIGITS.search(notes)
        ):
            raise tarfile.ReadError("a header's notes are beyond reason")
        return super()._proc_pax(tarfile_)  # pyright: ignore[reportAttributeAccessIssue]


def _members(path: Path, file: BinaryIO) -> Iterator[_Member]:
    """Each member that is no folder, by the first dot of its name.

    A shard that is cut ends with a problem of the member that is, or with _CUT where the cut is
    between two.
    """
    try:
        tar = tarfile.open(  # noqa: SIM115, the caller closes the file
            fileobj=file, mode="r:", tarinfo=_Header
        )
    except _DAMAGE as error:
        if is_shortage(error):
            raise
        log.warning("%s: is not a tar file, or a compressed one", path)
        yield _Member("the whole file", "", problem="not a tar file")
        return
    end, length = 0, path.stat().st_size
    try:
        while (member := tar.next()) is not None:
            tar.members = []  # pyright: ignore[reportAttributeAccessIssue]: it would keep them all
            if member.size < 0 or tar.offset <= end:  # a header made to go round in circles
                break
            end = tar.offset
            if member.isdir():
                continue
            found = _KEY.fullmatch(member.name)
            key, rest = found.groups() if found else ("", member.name.rpartition("/")[2])
            is_file = member.isreg() and not member.issparse()
            if member.name.startswith("/") or ".." in member.name.split("/"):
                yield _Member(key or member.name, rest, problem="unsafe member name")
            elif is_file and member.offset_data + member.size > length:
                log.warning(
                    "%s: ends within %s; what comes before it is used",
                    *(escaped(str(path)), escaped(member.name)),
                )
                yield _Member(key or member.name, rest, problem="truncated shard")
                return
            elif not is_file:
                yield _Member(key, f"{rest} ({'a link' if _is_link(member) else 'not a file'})")
            elif key.startswith("__"):  # WebDataset's notes are named so
                yield _Member("", member.name.rpartition("/")[2])
            else:
                yield _Member(key, rest, member.offset_data, member.size)
    except _DAMAGE as error:  # else it is what tarfile takes for the end
        if is_shortage(error):
            raise
    file.seek(end)
    if (block := file.read(_BLOCK)) != bytes(_BLOCK):
        log.warning("%s: is cut or damaged at byte %d; what comes before is used", path, end)
        yield _Member(f"byte {end}", "", problem="truncated shard") if block else _CUT


def _is_link(member: tarfile.TarInfo) -> bool:
    return member.issym() or member.islnk()


def _short(key: bytes, number: int) -> bytes:
    """A key that is not long, and no other's."""
    return key if len(key) <= _MAX_KEY_BYTES else key[: _MAX_KEY_BYTES - 12] + b"~%d" % number
