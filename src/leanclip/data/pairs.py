"""The `pairs` layout: a folder tree of images, each with a text file of the same name.

    root[/split]/any/where/dog.jpg   root[/split]/any/where/dog.txt   (a caption a line)

Pairs are keyed by path: a/1.jpg belongs to a/1.txt and never to b/1.txt. PASSL's
`data/FOOD101/captions/` is such a tree.
"""

import os
from pathlib import Path

from leanclip.config import DataConfig
from leanclip.data.samples import Dataset, read_lines, split_folder
from leanclip.errors import DataError
from leanclip.images import SUFFIXES


def open_dataset(config: DataConfig) -> Dataset:
    """Find every image under the folder and read its captions.

    Raises:
        DataError: no folder, no images, or an image whose captions are missing or empty.
    """
    folder = split_folder(config.root, config.split)
    paths = find_images(folder)
    missing = [path for path in paths if not path.with_suffix(".txt").is_file()]
    if missing:
        raise DataError(
            f"{missing[0]}: has no caption file {missing[0].with_suffix('.txt').name} beside it "
            f"({len(missing)} of {len(paths)} images have none); write one, or remove the image"
        )
    return Dataset(paths, captions=[_read_captions(path.with_suffix(".txt")) for path in paths])


def find_images(folder: Path) -> list[Path]:
    """Every image under a folder, by suffix in any letter case, in the order of their paths.

    Raises:
        DataError: there are none.
    """
    paths = sorted(
        Path(where, name)
        for where, _, names in os.walk(folder)
        for name in names
        if name[name.rfind(".") :].lower() in SUFFIXES
    )
    if not paths:
        known = " ".join(sorted(SUFFIXES))
        raise DataError(f"{folder}: no images found (looked for {known} in every folder below)")
    return paths


def _read_captions(path: Path) -> list[str]:
    captions = read_lines(path)
    if not captions:
        raise DataError(
            f"{path}: an empty caption file; write a caption a line, or remove the pair"
        )
    return captions
