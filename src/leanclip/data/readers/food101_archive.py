"""Getting Food-101: space -> archive -> checksum -> unpacked beside its place -> renamed.

Whatever breaks, what is at the data set's place is whole or not there, and the same command goes
on: a broken download where it broke, a broken unpacking from the archive.
"""

import shutil
import tarfile
import zlib
from collections.abc import Callable, Iterator
from gzip import BadGzipFile
from lzma import LZMAError
from pathlib import Path, PurePosixPath

from leanclip.errors import DataError
from leanclip.io.download import fetch
from leanclip.io.files import digest

URL = "http://data.vision.ee.ethz.ch/cvl/food-101.tar.gz"
MD5 = "85eeb15f3717b99a5da872d97d918f87"
TOP = "food-101"  # the archive's one folder
SIZE = 5_000_000_000  # bytes of the archive, where no server says so
UNPACKED = 1.1  # space that unpacking takes, times the archive: it holds JPEGs

Progress = Callable[[str, int, int], None]  # what is done, bytes done, bytes in all (0: unknown)


def get_food101(
    root: Path,
    *,
    archive: Path | None = None,
    url: str = URL,
    checksum: str | None = MD5,
    keep_archive: bool = False,
    progress: Progress = lambda what, done, total: None,
) -> bool:
    """Put Food-101 at `root`, unless it is there.

    Args:
        root: where the folder `food-101` of the archive shall be.
        archive: a copy of it; else it is fetched to beside `root`, and removed afterwards.
        url: where to fetch it.
        checksum: its MD5 or SHA-256; None: any will do.
        keep_archive: do not remove a fetched archive.
        progress: is called again and again.

    Returns:
        Whether anything had to be done.

    Raises:
        DataError: something else is at `root`; there is no space; the archive cannot be fetched,
            differs from its checksum, is damaged, or holds what does not belong there.
    """
    if (root / "meta" / "train.txt").is_file() and (root / "images").is_dir():
        return False
    if root.exists() and not (root.is_dir() and not any(root.iterdir())):
        raise DataError(f"{root}: holds something other than Food-101; choose another folder")
    root.parent.mkdir(parents=True, exist_ok=True)
    if archive is None:
        path = root.parent / (url.rstrip("/").rpartition("/")[2].partition("?")[0] or f"{TOP}.tar")
        if not path.is_file():
            _download(url, path, progress)
    else:
        path = archive
        if not path.is_file():
            raise DataError(f"--archive: no such file: {path}")
    need_space(root.parent, int(UNPACKED * path.stat().st_size), "to unpack it")
    again = "remove it and run this again" if archive is None else "give another --archive"
    if checksum is not None:
        _check(path, checksum, again)
    _unpack(path, root, again, progress)
    if archive is None and not keep_archive:
        path.unlink()
    return True


def need_space(folder: Path, needed: int, what: str) -> None:
    """Refuse to begin what does not fit.

    Raises:
        DataError: the folder's disk has less than `needed` bytes.
    """
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise DataError(
            f"{folder}: {needed / 1e9:.1f} GB are needed {what}, {free / 1e9:.1f} GB are free; "
            f"make space, or choose a folder on another disk"
        )


def _download(url: str, path: Path, progress: Progress) -> None:
    """Fetch the archive, if it and what is in it will fit."""
    is_checked = False

    def told(done: int, total: int) -> None:
        nonlocal is_checked
        if not is_checked:  # the server has just said how large it is
            size = total or SIZE
            needed = max(size - done, 0) + int(UNPACKED * size)
            need_space(path.parent, needed, "to download and unpack it")
            is_checked = True
        progress("downloading", done, total)

    fetch(url, path, progress=told)


def _check(path: Path, checksum: str, again: str) -> None:
    """Refuse another archive; `again` says what to do."""
    found = digest(path, len(checksum))
    if found != checksum.lower():
        raise DataError(
            f"{path}: its checksum is {found}, not {checksum}: it is damaged or another archive; "
            f"{again}, or give --checksum (none: any archive will do)"
        )


def _unpack(path: Path, root: Path, again: str, progress: Progress) -> None:
    """Unpack into a folder beside `root`, which takes its place when it is whole."""
    if not hasattr(tarfile, "data_filter"):
        raise DataError("Python 3.11.4 or later is needed to unpack archives safely")
    beside = root.parent / f".{root.name}.unpacking"
    shutil.rmtree(beside, ignore_errors=True)  # of a run that was ended
    beside.mkdir()
    try:
        for done in _members_into(beside, path, again):
            progress("unpacking", done, path.stat().st_size)
        if not (beside / TOP / "meta" / "train.txt").is_file():
            raise DataError(f"{path}: has no {TOP}/meta/train.txt: it is not Food-101's archive")
        (beside / TOP).rename(root)
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def _members_into(folder: Path, path: Path, again: str) -> Iterator[int]:
    """Unpack an archive; gives after each member how many of the archive's bytes are read.

    Raises:
        DataError: it is damaged, or a member is refused.
    """
    try:
        with path.open("rb") as file, tarfile.open(fileobj=file, mode="r:*") as tar:
            while (member := tar.next()) is not None:
                tar.members = []  # pyright: ignore[reportAttributeAccessIssue]: it would keep them
                _belongs(member, path)
                tar.extract(member, folder, filter="data", set_attrs=False)
                yield file.tell()
            _has_ended(tar)
    except tarfile.FilterError as error:
        raise DataError(f"{path}: is not safe to unpack: {error}") from None
    except (tarfile.TarError, EOFError, zlib.error, BadGzipFile, LZMAError) as error:
        why = str(error).partition(":\n")[0]  # what follows is why it is not bzip2, and so on
        raise DataError(f"{path}: is cut short or damaged ({why}); {again}") from None


def _has_ended(tar: tarfile.TarFile) -> None:
    """Tell the end from damage, which tarfile takes for it; a gzip's checksum is checked at it."""
    assert tar.fileobj is not None
    tar.fileobj.seek(tar.offset)
    while block := tar.fileobj.read(1 << 20):
        if block.strip(b"\0"):
            raise tarfile.ReadError(f"no header at byte {tar.offset}")


def _belongs(member: tarfile.TarInfo, path: Path) -> None:
    """Refuse all but files and folders under the archive's one folder."""
    parts = PurePosixPath(member.name).parts
    if not parts or parts[0] != TOP or ".." in parts or not (member.isreg() or member.isdir()):
        kind = "a link or device" if not (member.isreg() or member.isdir()) else "a name"
        raise DataError(
            f"{path}: is not safe to unpack: {member.name!r} is {kind} that is not Food-101's"
        )
