"""What a tar shard holds and where, found once and kept: nothing is ever extracted from it.

    tar -> headers, through the standard library -> a row per sample: offsets and sizes -> .npy

WebDataset's rule says what a sample is: consecutive members whose paths are the same up to the
first dot of the last name; what follows the dot says what a member is.
"""

import logging
import re
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from leanclip.data.readers.cached import cached, cached_path
from leanclip.errors import is_shortage
from leanclip.io.files import write_array

log = logging.getLogger("leanclip")

IMAGES = ("jpg", "jpeg", "png", "webp", "bmp", "gif", "tif", "tiff")  # the first there is counts
PARTS = ("image", "txt", "json", "cls")
PROBLEMS = (  # by their number in an index; 0: none
    "",
    "unsafe member name",
    "duplicate member",
    "truncated shard",
    "not a tar file",
)
_LONGEST_KEY = 255  # bytes that are kept of one
_BLOCK = 512  # of a tar
_LONGEST_NOTES, _MOST_NOTES = 1 << 16, 1000  # bytes of a header's, number of all members'
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

    Raises:
        DataError: the cache folder cannot be written.
        OSError: the shard cannot be read.
    """
    return cached(
        [path], "npy", lambda part: write_array(part, build_index(path)), _load, identity=identity
    )


def is_indexed(path: Path) -> bool:
    """Whether a shard has been looked through before."""
    return cached_path([path], "npy").is_file()


def _load(kept: Path) -> np.ndarray | None:
    """An index; None of what a crash or a full disk left of one."""
    index = np.load(kept, mmap_mode="r" if kept.stat().st_size > 1 << 16 else None)
    return index if isinstance(index, np.ndarray) and index.dtype.names else None


def build_index(path: Path) -> np.ndarray:
    """Look through a shard; what is wrong with it is a row with a problem, and a warning."""
    rows: list[_Row] = []
    with path.open("rb") as file:
        for key, what, offset, size in _members(path, file):
            is_cut = what == "truncated shard" and rows and not rows[-1].is_whole()
            if key and not is_cut and not (rows and rows[-1].key == key):
                rows.append(_Row(key))
            if what not in PROBLEMS:
                rows[-1].add(what, offset, size)
            elif key or is_cut:
                rows[-1].problem = PROBLEMS.index(what)
    rows = [row for row in rows if row.problem or row.members]
    keys = [_short(row.key.encode("utf-8", "surrogateescape"), i) for i, row in enumerate(rows)]
    fields = [field for part in PARTS for field in ((part, "u8"), (f"{part}_size", "u8"))]
    width = max(map(len, keys), default=1)
    index = np.zeros(len(rows), [("key", f"S{width}"), ("problem", "u1"), *fields])
    index["key"] = keys
    index["problem"] = [row.problem for row in rows]
    for part in PARTS:
        places = [row.place(part) for row in rows]
        index[part] = [offset for offset, _ in places]
        index[f"{part}_size"] = [size for _, size in places]
    return index


class _Row:
    """One sample while its members come."""

    def __init__(self, key: str) -> None:
        self.key, self.problem = key, 0
        self.members: dict[str, tuple[int, int]] = {}

    def add(self, extension: str, offset: int, size: int) -> None:
        if extension in self.members:
            self.problem = PROBLEMS.index("duplicate member")
        if extension in (*IMAGES, *PARTS[1:]):
            self.members[extension] = offset, size

    def is_whole(self) -> bool:
        """Whether it has an image and something that says what is on it."""
        return self.place("image") != (0, 0) and any(part in self.members for part in PARTS[1:])

    def place(self, part: str) -> tuple[int, int]:
        names = IMAGES if part == "image" else (part,)
        return next((self.members[name] for name in names if name in self.members), (0, 0))


class _Header(tarfile.TarInfo):
    """A member's header, whose notes (pax) are within reason.

    The standard library takes quadratic time over digits in them, in some versions, and over many
    notes that hold for all members.
    """

    def _proc_pax(self, tarfile_: tarfile.TarFile) -> tarfile.TarInfo:
        file: Any = tarfile_.fileobj
        place = file.tell()
        notes = file.read(min(max(self.size, 0), _LONGEST_NOTES + 1))
        file.seek(place)
        if (
            len(notes) > _LONGEST_NOTES
            or len(tarfile_.pax_headers) > _MOST_NOTES
            or _DIGITS.search(notes)
        ):
            raise tarfile.ReadError("a header's notes are beyond reason")
        return super()._proc_pax(tarfile_)  # pyright: ignore[reportAttributeAccessIssue]


def _members(path: Path, file: BinaryIO) -> Iterator[tuple[str, str, int, int]]:
    """Each regular member: key, extension in lower case (or a problem), offset and size.

    A shard that is cut ends with a problem of the member that is, or of no key where the cut is
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
        yield "the whole file", "not a tar file", 0, 0
        return
    end, length = 0, path.stat().st_size
    try:
        while (member := tar.next()) is not None:
            tar.members = []  # pyright: ignore[reportAttributeAccessIssue]: it would keep them all
            if member.size < 0 or tar.offset <= end:  # a header made to go round in circles
                break
            end = tar.offset
            found = _KEY.fullmatch(member.name)
            key = found[1] if found else member.name
            if not member.isreg() or member.issparse():
                continue
            if member.name.startswith("/") or ".." in member.name.split("/"):
                yield key, "unsafe member name", 0, 0
            elif member.offset_data + member.size > length:
                log.warning("%s: ends within %s; what comes before it is used", path, member.name)
                yield key, "truncated shard", 0, 0
                return
            elif found and not key.startswith("__"):  # WebDataset's notes are named so
                yield key, found[2].lower(), member.offset_data, member.size
    except _DAMAGE as error:  # else it is what tarfile takes for the end
        if is_shortage(error):
            raise
    file.seek(end)
    if (block := file.read(_BLOCK)) != bytes(_BLOCK):
        log.warning("%s: is cut or damaged at byte %d; what comes before is used", path, end)
        yield f"byte {end}" if block else "", "truncated shard", 0, 0


def _short(key: bytes, number: int) -> bytes:
    """A key that is not long, and no other's."""
    return key if len(key) <= _LONGEST_KEY else key[: _LONGEST_KEY - 12] + b"~%d" % number
