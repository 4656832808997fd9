"""Downloading Food-101: archive -> checksum -> unpacked beside its place -> renamed.

The data set's folder appears whole or not at all. The same command resumes an interrupted download,
and repeats an interrupted unpacking.
"""

import shutil
import tarfile
import zlib
from collections.abc import Callable
from gzip import BadGzipFile
from lzma import LZMAError
from pathlib import Path, PurePosixPath

from leanclip.errors import DataError
from leanclip.io.download import fetch
from leanclip.io.files import digest

URL = "http://data.vision.ee.ethz.ch/cvl/food-101.tar.gz"
MD5 = "85eeb15f3717b99a5da872d97d918f87"
TOP = "food-101"  # the archive's one folder

Progress = Callable[[str, int, int], None]  # what is done, bytes done, total bytes (0: unknown)


def get_food101(
    root: Path,
    *,
    archive: Path | None = None,
    url: str = URL,
    checksum: str | None = MD5,
    keep_archive: bool = False,
    progress: Progress = lambda what, done, total: None,
) -> bool:
    """Download and unpack Food-101 to `root`, unless it is there.

    Args:
        root: the folder to make.
        archive: a local copy; else it is downloaded to beside `root`, and removed afterwards.
        url: where to download it from.
        checksum: its MD5 or SHA-256; None: not checked.
        keep_archive: do not remove a downloaded archive.
        progress: called repeatedly.

    Returns:
        Whether anything had to be done.

    Raises:
        DataError: something else is at `root`; or the archive cannot be downloaded, differs from
            its checksum, is damaged, or has members that are not Food-101's.
    """
    if (root / "meta" / "train.txt").is_file() and (root / "images").is_dir():
        return False
    if root.exists() and not (root.is_dir() and not any(root.iterdir())):
        raise DataError(f"{root}: holds something other than Food-101; choose another folder")
    root.parent.mkdir(parents=True, exist_ok=True)
    path = archive or root.parent / PurePosixPath(url.partition("?")[0]).name
    if archive is None and not path.is_file():
        fetch(url, path, progress=lambda done, total: progress("downloading", done, total))
    if not path.is_file():
        raise DataError(f"--archive: no such file: {path}")
    advice = "remove it and run this again" if archive is None else "give another --archive"
    if checksum is not None and (found := digest(path, len(checksum))) != checksum.lower():
        raise DataError(
            f"{path}: its checksum is {found}, not {checksum}: it is damaged or another archive; "
            f"{advice}, or give --checksum (none: any archive will do)"
        )
    _unpack(path, root, advice, progress)
    if archive is None and not keep_archive:
        path.unlink()
    return True


def _unpack(path: Path, root: Path, advice: str, progress: Progress) -> None:
    """Unpack into a folder beside `root`, which is renamed when it is whole."""
    size = path.stat().st_size
    beside = root.parent / f".{root.name}.unpacking"
    shutil.rmtree(beside, ignore_errors=True)  # of an interrupted run
    beside.mkdir()

    def check(member: tarfile.TarInfo, folder: str) -> tarfile.TarInfo | None:
        progress("unpacking", file.tell(), size)
        _check_member(member, path)
        return tarfile.data_filter(member, folder)

    try:
        with path.open("rb") as file, tarfile.open(fileobj=file, mode="r:*") as tar:
            tar.extractall(beside, filter=check)
            _check_end(tar)
        if not (beside / TOP / "meta" / "train.txt").is_file():
            raise DataError(f"{path}: has no {TOP}/meta/train.txt: it is not Food-101's archive")
        (beside / TOP).rename(root)
    except tarfile.FilterError as error:
        raise DataError(f"{path}: is not safe to unpack: {error}") from None
    except (tarfile.TarError, EOFError, zlib.error, BadGzipFile, LZMAError) as error:
        reason = str(error).partition(":\n")[0]  # tarfile goes on to list each compression
        raise DataError(f"{path}: is cut short or damaged ({reason}); {advice}") from None
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def _check_member(member: tarfile.TarInfo, path: Path) -> None:
    """Refuse all but files and folders under the archive's one folder."""
    parts = PurePosixPath(member.name).parts
    is_file = member.isreg() or member.isdir()
    if not parts or parts[0] != TOP or ".." in parts or not is_file:
        kind = "a name" if is_file else "a link or device"
        raise DataError(
            f"{path}: is not safe to unpack: {member.name!r} is {kind} that is not Food-101's"
        )


def _check_end(tar: tarfile.TarFile) -> None:
    """Read to the end: tarfile takes a damaged header for it, and gzip has its checksum there."""
    assert tar.fileobj is not None
    tar.fileobj.seek(tar.offset)
    while block := tar.fileobj.read(1 << 20):
        if block.strip(b"\0"):
            raise tarfile.ReadError(f"no header at byte {tar.offset}")
