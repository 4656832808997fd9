"""Images in folders, found by the suffixes of their names."""

import os
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import NoReturn

from leanclip.data.dataset import sorted_names
from leanclip.errors import DataError
from leanclip.preprocess.image_formats import SUFFIXES, UNREAD_SUFFIXES

# Folders that macOS, Synology, QNAP and Windows create beside data.
NOT_DATA = frozenset(
    ("__MACOSX", "@eaDir", "#recycle", "@Recycle", "$RECYCLE.BIN", "System Volume Information")
)


def find_images(folder: Path) -> list[Path]:
    """`list_images`, which must not be empty.

    Raises:
        DataError: there are no images, or a folder cannot be read.
    """
    paths = list_images(folder)
    if not paths:
        raise no_images(folder)
    return paths


def list_images(folder: Path) -> list[Path]:
    """Images under a folder, by suffix in any letter case, sorted by path.

    Images in formats that are not read (HEIC, RAW, ...) are included, to be counted as skipped,
    unless an image of the same name is beside them. Hidden files and folders and those of the
    system (NOT_DATA) are left out. Links to folders are followed, into each folder once.

    Raises:
        DataError: a folder cannot be read.
    """
    return sorted(path for images in _walk(folder) for path in images)


def has_images(folder: Path, *, recursive: bool = True) -> bool:
    """Whether there are images under a folder, or directly in it.

    Raises:
        DataError: a folder cannot be read.
    """
    folders = _walk(folder) if folder.is_dir() else iter(())
    return any(folders) if recursive else bool(next(folders, []))


def visible_folders(folder: Path) -> list[Path]:
    """The folders in a folder but hidden ones and those of the system; none if it does not exist.

    They are sorted as numbers where all names are whole numbers, else by name.

    Raises:
        DataError: it cannot be read.
    """
    if not folder.is_dir():
        return []
    try:
        with os.scandir(folder) as entries:
            names = [entry.name for entry in entries if _is_data(entry.name) and entry.is_dir()]
    except OSError as error:
        _refuse(error)
    return [folder / name for name in sorted_names(names)]


def suffix_of(name: str) -> str:
    """From a name's last dot on, in lower case."""
    return name[name.rfind(".") :].lower()


def no_images(folder: Path) -> DataError:
    """The error for a folder without images."""
    known = " ".join(sorted(SUFFIXES))
    return DataError(f"{folder}: no images found (looked for {known} in every folder below)")


def _walk(folder: Path) -> Iterator[list[Path]]:
    """The images directly in each folder, from the top down."""
    seen = set()
    for where, folders, names in os.walk(folder, onerror=_refuse, followlinks=True):
        real = os.path.realpath(where)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(filter(_is_data, folders))
        images = _with_suffix(names, SUFFIXES)
        stems = {name[: name.rfind(".")] for name in images}
        unread = _with_suffix(names, UNREAD_SUFFIXES)
        images += [name for name in unread if name[: name.rfind(".")] not in stems]
        yield [Path(where, name) for name in images]


def _with_suffix(names: list[str], suffixes: Collection[str]) -> list[str]:
    return [name for name in names if suffix_of(name) in suffixes and not name.startswith(".")]


def _is_data(folder: str) -> bool:
    return not folder.startswith(".") and folder not in NOT_DATA


def _refuse(error: OSError) -> NoReturn:
    raise DataError(f"{error.filename}: cannot be read: {error.strerror}")
