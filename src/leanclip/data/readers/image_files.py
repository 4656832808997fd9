"""The images under a folder, found by the suffixes of their names."""

import os
from collections.abc import Container, Iterator
from pathlib import Path
from typing import NoReturn

from leanclip.data.dataset import sorted_names
from leanclip.errors import DataError
from leanclip.preprocess.image_formats import SUFFIXES, UNREAD_SUFFIXES

# What macOS, Synology, QNAP and Windows put beside or into people's folders.
NOT_DATA = frozenset(
    ("__MACOSX", "@eaDir", "#recycle", "@Recycle", "$RECYCLE.BIN", "System Volume Information")
)


def find_images(folder: Path) -> list[Path]:
    """Every image under a folder, as `list_images` has them.

    Raises:
        DataError: there are none, or a folder cannot be read.
    """
    paths = list_images(folder)
    if not paths:
        raise no_images(folder)
    return paths


def list_images(folder: Path) -> list[Path]:
    """Images under a folder, by suffix in any letter case, in the order of their paths.

    Those in formats that are not read (HEIC, RAW, ...) are among them, to be counted as skipped,
    but where an image of the same name is beside them. Names that begin with a dot and folders
    that systems make (NOT_DATA) are passed over. Links to folders are followed, into each once.

    Raises:
        DataError: a folder cannot be read.
    """

    def refuse(error: OSError) -> NoReturn:
        raise DataError(f"{error.filename}: cannot be read: {error.strerror}")

    paths, seen = [], set()
    for where, folders, names in os.walk(folder, onerror=refuse, followlinks=True):
        real = os.path.realpath(where)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(filter(_is_data, folders))
        images = [name for name in names if _is_named_as(name, SUFFIXES)]
        read = {name[: name.rfind(".")] for name in images}  # of these others are copies
        unread = [name for name in names if _is_named_as(name, UNREAD_SUFFIXES)]
        images += [name for name in unread if name[: name.rfind(".")] not in read]
        paths += [Path(where, name) for name in images]
    return sorted(paths)


def has_images(folder: Path, *, deep: bool = True) -> bool:
    """Whether there are images under a folder, or directly in it; looks no further than needed.

    Raises:
        DataError: a folder cannot be read.
    """
    waiting, seen = [folder] if folder.is_dir() else [], set()
    while waiting:
        where = waiting.pop()
        if (real := os.path.realpath(where)) in seen:
            continue
        seen.add(real)
        for entry in _entries(where):
            if entry.is_dir():
                waiting += [Path(entry.path)] if deep and _is_data(entry.name) else []
            elif _is_named_as(entry.name, SUFFIXES | UNREAD_SUFFIXES):
                return True
    return False


def visible_folders(folder: Path) -> list[Path]:
    """The folders in a folder but hidden ones and those that systems make; none of no folder.

    Where all names are whole numbers they are in the order of the numbers, else of the names.

    Raises:
        DataError: it cannot be read.
    """
    if not folder.is_dir():
        return []
    names = [entry.name for entry in _entries(folder) if _is_data(entry.name) and entry.is_dir()]
    return [folder / name for name in sorted_names(names)]


def _entries(folder: Path) -> Iterator[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            yield from entries
    except OSError as error:
        raise DataError(f"{folder}: cannot be read: {error.strerror}") from None


def _is_data(folder: str) -> bool:
    return not folder.startswith(".") and folder not in NOT_DATA


def _is_named_as(name: str, suffixes: Container[str]) -> bool:
    return suffix_of(name) in suffixes and not name.startswith(".")


def suffix_of(name: str) -> str:
    """From a name's last dot on, in small letters."""
    return name[name.rfind(".") :].lower()


def no_images(folder: Path) -> DataError:
    """What is to be said of a folder without images."""
    known = " ".join(sorted(SUFFIXES))
    return DataError(f"{folder}: no images found (looked for {known} in every folder below)")
