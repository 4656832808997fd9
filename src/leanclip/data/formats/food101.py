"""The `food101` format: Food-101's official archive, unpacked (Bossard et al., 2014).

    root/images/<class>/<id>.jpg
    root/meta/{train,test}.txt   (`class/id` per line)   root/meta/{classes,labels}.txt

Settings: split, templates, class_names.
"""

from pathlib import Path

from leanclip.config.data import DataConfig
from leanclip.data.dataset import Dataset, ImageFiles, check_templates, read_class_file, read_lines
from leanclip.data.prompts import FOOD101_TRAINING, PROMPTS
from leanclip.errors import DataError

ROOT = "data/food-101"  # where `leanclip data food101` puts it


def open_dataset(config: DataConfig) -> Dataset:
    """The images that meta/<split>.txt lists, with their classes.

    Raises:
        DataError: no folder, a list is missing, empty or names an unknown class.
    """
    if not Path(config.root).is_dir():
        where = "" if config.root == ROOT else f" {config.root}"
        raise DataError(
            f"data.root: no such folder: {config.root} (get it with: leanclip data food101{where})"
        )
    root = Path(config.root)
    if not (root / "meta").is_dir():
        raise DataError(f"data.root: no folder meta in {root}: is it Food-101's unpacked archive?")
    split = config.split or "train"
    folders = read_lines(root / "meta" / "classes.txt")
    names = read_lines(root / "meta" / "labels.txt")
    if len(folders) != len(names):
        raise DataError(
            f"{root / 'meta'}: classes.txt has {len(folders)} lines and labels.txt {len(names)}"
        )
    if config.class_names is not None:
        names = read_class_file(Path(config.class_names)).names_of(folders, config.class_names)
    label_of = {folder: label for label, folder in enumerate(folders)}
    listed = root / "meta" / f"{split}.txt"
    paths: list[Path] = []
    labels: list[int] = []
    for line in read_lines(listed):
        folder, _, name = line.partition("/")
        if folder not in label_of or not name or "/" in name or name in (".", ".."):
            raise DataError(f"{listed}: {line!r} is not of the form class/id with a known class")
        paths.append(root / "images" / folder / f"{name}.jpg")
        labels.append(label_of[folder])
    if not paths:
        raise DataError(f"{listed}: lists no images")
    own = FOOD101_TRAINING if split == "train" else PROMPTS["food101"].templates
    return ImageFiles(
        paths,
        labels,
        names if config.class_names is not None else [name.lower() for name in names],
        check_templates(own if config.templates is None else config.templates),
    )
