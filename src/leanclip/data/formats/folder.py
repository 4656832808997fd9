"""The `folder` format: images in one folder per class (ImageFolder).

    root[/split]/<class>/*.jpg
    root/classes.txt, or data.class_names   (optional: `folder<TAB>name` or `name` per line)
    root/templates.txt, or data.templates   (optional: one caption per line, {} for the name)

Settings: split, templates, class_names.
Classes are sorted by folder name, as numbers where all names are whole numbers. A class without a
name is called like its folder, with spaces for underscores. A folder without images is a class too;
hidden folders and those of the system (`__MACOSX`) are not.
"""

from pathlib import Path

from leanclip.config.data import DataConfig
from leanclip.data.dataset import (
    Dataset,
    ImageFiles,
    choose_templates,
    read_class_file,
    readable,
    sorted_names,
    split_folder,
)
from leanclip.data.readers.image_files import list_images, no_images, visible_folders
from leanclip.errors import DataError


def open_dataset(config: DataConfig) -> Dataset:
    """Find the classes and their images.

    Raises:
        DataError: no folder, no classes, no images, or a class without a name.
    """
    folder, root = split_folder(config.root, config.split), Path(config.root)
    folders = [path.name for path in visible_folders(folder)]
    if not folders:
        raise DataError(f"{folder}: no class folders found in it")
    path = Path(config.class_names or root / "classes.txt")
    names = [readable(name).replace("_", " ") for name in folders]
    if config.class_names is not None or path.is_file():
        folders, names = _named(path, folders, _others(root, folder))
    paths, labels = [], []
    for label, name in enumerate(folders):
        found = list_images(folder / name) if (folder / name).is_dir() else []
        paths += found
        labels += [label] * len(found)
    if not paths:
        raise no_images(folder)
    return ImageFiles(
        paths, labels, names, choose_templates(config.templates, root / "templates.txt")
    )


def _named(path: Path, folders: list[str], others: list[str]) -> tuple[list[str], list[str]]:
    """Class folders and their names, from a file of names.

    A class of the file that has a folder in another split only is a class without images, so that
    all splits have the same classes.
    """
    given = read_class_file(path)
    union = sorted_names([*folders, *others])
    is_of_all = len(given.names) == len(union) and len(given.names) != len(folders)
    missing = {readable(name) for name in union} - {readable(name) for name in folders}
    if is_of_all or missing & set(given.keys):
        folders = union
    return folders, given.names_of([readable(name) for name in folders], str(path))


def _others(root: Path, folder: Path) -> list[str]:
    """The class folders of other splits."""
    if folder == root:
        return []
    splits = [path for path in visible_folders(root) if path != folder]
    return [path.name for split in splits for path in visible_folders(split)]
