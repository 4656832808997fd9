"""The `folder` layout: images in one folder per class (ImageFolder).

    root[/split]/<class>/*.jpg
    root/classes.txt, or data.class_names   (optional: `folder<TAB>name` or `name` a line)
    root/templates.txt, or data.templates   (optional: a caption a line, {} for the name)

Without names a class is called as its folder, with spaces for underscores. A folder without
images is a class all the same; names that begin with a dot are passed over.
"""

from collections.abc import Sequence
from pathlib import Path

from leanclip.config.schema import DataConfig
from leanclip.data.dataset import (
    Dataset,
    ImageFiles,
    choose_templates,
    read_class_names,
    split_folder,
)
from leanclip.data.readers.image_files import list_images, no_images
from leanclip.errors import DataError


def open_dataset(config: DataConfig) -> Dataset:
    """Find the classes and their images.

    Raises:
        DataError: no folder, no classes, no images, or a class without a name.
    """
    folder = split_folder(config.root, config.split)
    try:
        inside = sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    except OSError as error:
        raise DataError(f"{folder}: cannot be read: {error.strerror}") from None
    folders = [path for path in inside if path.is_dir()]
    if not folders:
        raise DataError(f"{folder}: no class folders found in it")
    names, path = {}, Path(config.class_names or Path(config.root) / "classes.txt")
    if config.class_names is not None or path.is_file():
        names = _names(path, folders)
    paths, labels = [], []
    for label, class_folder in enumerate(folders):
        found = list_images(class_folder)
        paths += found
        labels += [label] * len(found)
    if not paths:
        raise no_images(folder)
    return ImageFiles(
        paths,
        labels,
        [names.get(path.name, path.name.replace("_", " ")) for path in folders],
        choose_templates(config.templates, Path(config.root) / "templates.txt"),
    )


def _names(path: Path, folders: Sequence[Path]) -> dict[str, str]:
    """Names by folder, from a file of them."""
    lines = read_class_names(path)
    pairs = [line.split("\t") for line in lines]
    if all(len(pair) == 1 for pair in pairs) and len(lines) == len(folders):
        return {folder.name: line for folder, line in zip(folders, lines, strict=True)}
    if any(len(pair) != 2 for pair in pairs):
        raise DataError(
            f"{path}: each line should be a folder, a tab and the class's name; or a name for "
            f"each of the {len(folders)} folders in alphabetical order, found {len(lines)} lines"
        )
    found = {folder.name for folder in folders}
    for name, _ in pairs:
        if name not in found:
            some = ", ".join(sorted(found)[:4])
            raise DataError(
                f"{path}: names the class {name!r}, which has no folder (found: {some})"
            )
    return dict(pairs)
