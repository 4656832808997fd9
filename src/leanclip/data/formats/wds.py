"""The `wds` format: a local folder of CLIP_benchmark's data sets in WebDataset form.

    root/test/0.tar ... test/nshards.txt      members .jpg, .png or .webp, with .cls or .txt
    root/classnames.txt                       one name per line, by label: classification
    root/zeroshot_classification_templates.txt    (optional; {c} for the name)
    root/dataset_type.txt                     (optional; classification or retrieval)

A sample's .cls is its label, a number from 0; its .txt has one caption per line.
"""

from pathlib import Path

from leanclip.config.data import DataConfig
from leanclip.data.dataset import (
    Dataset,
    choose_templates,
    read_class_names,
    read_lines,
    split_folder,
)
from leanclip.data.formats.shards import Shards
from leanclip.data.readers.shard_list import count_samples
from leanclip.errors import DataError

CLASSES = "classnames.txt"
TEMPLATES = "zeroshot_classification_templates.txt"


def open_dataset(config: DataConfig) -> Dataset:
    """The shards of a split; "test" where none is set.

    Raises:
        DataError: the folder, a shard or the class names are missing, or the labels are of
            several classes per image.
    """
    root = Path(config.root)
    folder = split_folder(config.root, config.split or "test")
    shards = _shards(folder)
    path = Path(config.class_names or root / CLASSES)
    classes = read_class_names(path) if _is_classification(root, path) else []
    sizes = count_samples(shards, config.cache_gigabytes * 1e9)
    if sum(sizes) == 0:
        raise DataError(f"{folder}: no samples in {len(shards)} shards")
    templates = choose_templates(config.templates, root / TEMPLATES) if classes else ()
    dataset = Shards(shards, sizes, config, classes, templates)
    dataset.has_reported = True  # by count_samples
    return dataset


def _is_classification(root: Path, names: Path) -> bool:
    """Whether the data is for classification; else it is for retrieval."""
    path = root / "dataset_type.txt"
    if not path.is_file():
        return names.is_file()
    kind = (read_lines(path) or [""])[0].lower()
    if kind not in ("classification", "retrieval"):
        raise DataError(f"{path}: is {kind!r}; only classification and retrieval can be evaluated")
    if kind == "classification" and not names.is_file():
        raise DataError(f"{names}: no such file; write one class name per line, by label")
    return kind == "classification"


def _shards(folder: Path) -> list[str]:
    """0.tar to as many as nshards.txt says; without it, all there are, by number."""
    path = folder / "nshards.txt"
    if not path.is_file():
        found = sorted(folder.glob("*.tar"), key=lambda path: (len(path.stem), path.stem))
        if not found:
            raise DataError(f"{folder}: no shards (*.tar) found in it")
        return [str(path) for path in found]
    text = "".join(read_lines(path))
    if not text.isdecimal() or not 0 < int(text) < 10**6:
        raise DataError(f"{path}: should hold a number of shards, found {text[:40]!r}")
    shards = [folder / f"{number}.tar" for number in range(int(text))]
    for shard in shards:
        if not shard.is_file():
            raise DataError(f"{shard}: no such shard; nshards.txt says there are {text}")
    return [str(shard) for shard in shards]
