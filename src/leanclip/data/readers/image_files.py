"""The images under a folder, found by the suffixes of their names."""

import os
from pathlib import Path
from typing import NoReturn

from leanclip.errors import DataError
from leanclip.preprocess.images import SUFFIXES


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

    Names that begin with a dot are passed over. Links to folders are followed, into each folder
    once.

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
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        paths += [
            Path(where, name)
            for name in names
            if name[name.rfind(".") :].lower() in SUFFIXES and not name.startswith(".")
        ]
    return sorted(paths)


def no_images(folder: Path) -> DataError:
    """What is to be said of a folder without images."""
    known = " ".join(sorted(SUFFIXES))
    return DataError(f"{folder}: no images found (looked for {known} in every folder below)")
