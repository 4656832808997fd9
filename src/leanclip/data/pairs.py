"""The `pairs` layout: a folder tree of images, each with a text file of the same name.

    root[/split]/any/where/dog.jpg   root[/split]/any/where/dog.txt   (a caption a line)

Pairs are keyed by path: a/1.jpg belongs to a/1.txt and never to b/1.txt. PASSL's
`data/FOOD101/captions/` is such a tree. Captions are read with their image.
"""

import os
from pathlib import Path
from typing import NoReturn

from leanclip.config import DataConfig
from leanclip.data.samples import Dataset, Sample, Strings, read_lines, split_folder
from leanclip.errors import DataError, SampleError
from leanclip.images import SUFFIXES


def open_dataset(config: DataConfig) -> Dataset:
    """Find every image under the folder.

    Raises:
        DataError: no folder, no images, or more than `max_bad_share` of them without a caption
            file, or with an empty one.
    """
    paths = find_images(split_folder(config.root, config.split))
    missing = [path for path in paths if not _has_captions(path)]
    if len(missing) > config.max_bad_share * len(paths):
        Pairs(missing)[0]  # raises what is wrong with it
    return Pairs(paths)


class Pairs(Dataset):
    """Images with a caption file beside each."""

    def __init__(self, paths: list[Path]) -> None:
        self.paths = Strings(map(str, paths))

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Sample:
        path = Path(self.paths[index])
        captions = path.with_suffix(".txt")
        if not captions.is_file():
            raise SampleError(
                "missing caption",
                f"{path}: has no caption file {captions.name} beside it; write one, or remove "
                f"the image",
            )
        lines = read_lines(captions)
        if not lines:
            raise SampleError(
                "empty caption",
                f"{captions}: an empty caption file; write a caption a line, or remove the pair",
            )
        return Sample(str(path), path, lines)

    def name(self, index: int) -> str:
        """The image's path."""
        return self.paths[index]


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


def _has_captions(path: Path) -> bool:
    try:
        return path.with_suffix(".txt").stat().st_size > 0
    except OSError:
        return False
