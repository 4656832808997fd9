"""The `wds` format: a folder of CLIP_benchmark's data sets in WebDataset form, as it is.

    root/test/0.tar ... test/nshards.txt      members .jpg, .png or .webp, with .cls or .txt
    root/classnames.txt                       a name a line, by label: classification
    root/zeroshot_classification_templates.txt    (optional: a template a line, {c} for the name)
    root/dataset_type.txt                     (optional: classification or retrieval)

A sample's .cls is its label, a number from 0; its .txt has a caption a line.
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
from leanclip.data.readers.shard_cache import count_samples
from leanclip.errors import DataError

CLASSES = "classnames.txt"
TEMPLATES = "zeroshot_classification_templates.txt"


def open_dataset(config: DataConfig) -> Dataset:
    """The shards of a split; "test" where none is set.

    Raises:
        DataError: no folder, a shard or the names are missing, or the labels are of several
            classes an image.
    """
    root = Path(config.root)
    folder = split_folder(config.root, config.split or "test")
    shards = _shards(folder)
    path = Path(config.class_names or root / CLASSES)
    kind = _kind(root, path)
    classes = read_class_names(path) if kind == "classification" else []
    sizes = count_samples(shards, config)
    if sum(sizes) == 0:
        raise DataError(f"{folder}: no samples in {len(shards)} shards")
    templates = choose_templates(config.templates, root / TEMPLATES) if classes else ()
    dataset = Shards(shards, sizes, config, classes, templates)
    dataset.has_remarked = True  # by count_samples
    return dataset


def _kind(root: Path, names: Path) -> str:
    """Whether the data is for classification or retrieval."""
    said, kinds = root / "dataset_type.txt", ("classification", "retrieval")
    if said.is_file():
        kind = (read_lines(said) or [""])[0].lower()
        if kind not in kinds:
            raise DataError(f"{said}: is {kind!r}; only {' and '.join(kinds)} can be measured")
        if kind == "classification" and not names.is_file():
            raise DataError(f"{names}: no such file; it names a class a line, by label")
        return kind
    return kinds[0] if names.is_file() else kinds[1]


def _shards(folder: Path) -> list[str]:
    """0.tar to as many as nshards.txt says; without it, all there are, by number."""
    said = folder / "nshards.txt"
    if not said.is_file():
        found = sorted(folder.glob("*.tar"), key=lambda path: (len(path.stem), path.stem))
        if not found:
            raise DataError(f"{folder}: no shards (*.tar) found in it")
        return [str(path) for path in found]
    text = "".join(read_lines(said))
    if not text.isdecimal() or not 0 < int(text) < 10**6:
        raise DataError(f"{said}: should hold a number of shards, found {text[:40]!r}")
    shards = [folder / f"{number}.tar" for number in range(int(text))]
    for shard in shards:
        if not shard.is_file():
            raise DataError(f"{shard}: no such shard; nshards.txt says there are {text}")
    return [str(shard) for shard in shards]
