"""The `pairs` format: a folder tree of images, each with a text file of the same name.

    root[/split]/any/where/dog.jpg   root[/split]/any/where/dog.txt   (one caption per line)

Settings: split, one_caption_per_line.
An image and its captions have the same path but for the suffix: a/1.jpg and a/1.txt. Captions are
read together with their image. PASSL's `data/FOOD101/captions/` is such a tree.
"""

from pathlib import Path

from leanclip.config.data import DataConfig
from leanclip.data.dataset import Dataset, Sample, StringArray, read_lines, split_folder
from leanclip.data.readers.image_files import find_images
from leanclip.errors import SampleError


def open_dataset(config: DataConfig) -> Dataset:
    """Find every image under the folder.

    Raises:
        DataError: no folder, no images, or more than `max_bad_fraction` of them without a caption
            file, or with an empty one.
    """
    paths = find_images(split_folder(config.root, config.split))
    missing = [path for path in paths if not _has_captions(path)]
    if len(missing) > config.max_bad_fraction * len(paths):
        Pairs(missing)[0]  # raises the error of the first one
    return Pairs(paths, one_caption_per_line=config.one_caption_per_line)


class Pairs(Dataset):
    """Images, each with a caption file beside it."""

    def __init__(self, paths: list[Path], *, one_caption_per_line: bool = True) -> None:
        self.paths = StringArray(map(str, paths))
        self.one_caption_per_line = one_caption_per_line

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Sample:
        path = Path(self.paths[index])
        file = path.with_suffix(".txt")
        if not file.is_file():
            raise SampleError(
                "missing caption",
                f"{path}: has no caption file {file.name} beside it; write one, or remove "
                f"the image",
            )
        lines = read_lines(file)
        if not lines:
            raise SampleError(
                "empty caption",
                f"{file}: an empty caption file; write one caption per line, or remove the pair",
            )
        captions = lines if self.one_caption_per_line else ["\n".join(lines)]
        return Sample(str(path), path, captions)

    def name(self, index: int) -> str:
        """The image's path."""
        return self.paths[index]


def _has_captions(path: Path) -> bool:
    try:
        return path.with_suffix(".txt").stat().st_size > 0
    except OSError:
        return False
