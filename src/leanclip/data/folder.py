"""The `folder` layout: images in one folder per class (ImageFolder).

    root[/split]/<class>/*.jpg   root/classes.txt (optional: `folder<TAB>name` a line)

Without classes.txt a class is called as its folder, with spaces for underscores.
"""

from pathlib import Path

from leanclip.config import DataConfig
from leanclip.data.pairs import find_images
from leanclip.data.samples import Dataset, check_templates, read_lines, split_folder
from leanclip.errors import DataError

TEMPLATES = ("a photo of a {}.",)


def open_dataset(config: DataConfig) -> Dataset:
    """Find the classes and their images.

    Raises:
        DataError: no folder, no classes, no images, or a class without a name.
    """
    folder = split_folder(config.root, config.split)
    folders = sorted(path for path in folder.iterdir() if path.is_dir())
    if not folders:
        raise DataError(f"{folder}: no class folders found in it")
    names = _names(Path(config.root) / "classes.txt")
    paths, labels = [], []
    for label, class_folder in enumerate(folders):
        found = find_images(class_folder)
        paths += found
        labels += [label] * len(found)
    return Dataset(
        paths,
        labels=labels,
        classes=[names.get(path.name, path.name.replace("_", " ")) for path in folders],
        templates=check_templates(config.templates or TEMPLATES, where="data.templates"),
    )


def _names(path: Path) -> dict[str, str]:
    """Names by folder, from classes.txt where there is one."""
    if not path.is_file():
        return {}
    pairs = [line.split("\t") for line in read_lines(path)]
    if any(len(pair) != 2 for pair in pairs):
        raise DataError(f"{path}: each line should be a folder, a tab and the class's name")
    return dict(pairs)
