"""Which splits a data set has, and the default split.

For every command: training, evaluation, `data check`, `data pack`, `search build`.
"""

import json
from collections.abc import Sequence
from pathlib import Path

from leanclip.config.data import SourceConfig
from leanclip.data.formats import table
from leanclip.data.readers.image_files import has_images, visible_folders
from leanclip.errors import DataError

FIXED = {"shapes": ("train", "val", "unseen"), "food101": ("train", "test")}
NAMES = ("train", "val", "valid", "validation", "dev", "test")  # of folders and files
_OTHER_NAMES = (*NAMES, "training", "validate", "testing", "eval", "evaluation")  # any letter case
HELD_OUT = ("val", "valid", "validation", "test", "dev")  # for evaluation, the first found
_IN_FOLDERS = ("folder", "pairs", "shards")  # whose splits are folders of the root


def find_splits(config: SourceConfig) -> tuple[str, ...]:
    """The names of the splits at `config.root`; empty if unknown."""
    if config.format in FIXED:
        return FIXED[config.format]
    return splits_in(config.format, Path(config.root), config.split)


def splits_in(format: str, root: Path, chosen: str | None = None) -> tuple[str, ...]:
    """The splits at a root, by the names of folders and files.

    Folders named `train`, `val` and so on are splits if they hold data of the format, and if
    there is no other data or `train` and another are among them: one alone, beside other folders
    of data, may be a class, unless it is `chosen` as the split to read.
    """
    found = tuple(name for name in NAMES if _has(format, root, name))
    if format not in _IN_FOLDERS or chosen in found:
        return found
    is_clear = len(found) > 1 and "train" in found
    return found if is_clear or not _other_data(format, root, found) else ()


def default_split(
    config: SourceConfig, task: str = "train", *, used: Sequence[str] = ()
) -> str | None:
    """The split that is read if none is set; None: the root itself.

    Args:
        config: its format and root.
        task: "train", or an evaluation, which prefers a held-out split.
        used: the splits of the same root that training reads.

    Raises:
        DataError: the choice is ambiguous.
    """
    if task != "train" and config.format in ("shapes", "food101", "wds"):
        is_val = config.format == "shapes" and task == "retrieval"
        return "val" if is_val else {"shapes": "unseen"}.get(config.format, "test")
    chosen = next(iter(used), None)
    found = find_splits(config.model_copy(update={"split": chosen}))
    held_out = next((name for name in HELD_OUT if name in found and name not in used), None)
    if task != "train" and held_out is not None:
        return held_out
    if "train" in found:
        return "train"
    if config.format == "wds":
        return "test"
    if found and task == "train":
        raise DataError(
            f"data.split: {config.root} has the splits {', '.join(found)}, and no train; set "
            f"data.split to one of them"
        )
    if chosen is None:
        _check_clear(config)
    return chosen


def training_split(config: SourceConfig) -> str | None:
    """The split that training reads, if the format has splits."""
    if config.split is not None or config.format == "mixture":
        return config.split
    if config.format == "hub" and (Path(config.root) / "state.json").is_file():
        return None  # saved without splits
    if config.format == "hub" or "train" in find_splits(config):
        return "train"
    return "test" if config.format == "wds" else None


def _has(format: str, root: Path, name: str) -> bool:
    """Whether a split of this name exists."""
    folder = root / name
    if format == "folder":
        return bool(visible_folders(folder))
    if format == "pairs":
        return has_images(folder)
    if format in ("shards", "wds"):
        return any(folder.glob("*.tar"))
    if format == "table":
        return root.is_dir() and bool(table.split_files(root, name))
    # For a data set on the hub this would need the network.
    saved = root / "dataset_dict.json"
    return (
        format == "hub"
        and saved.is_file()
        and name in json.loads(saved.read_text("utf-8"))["splits"]
    )


def _other_data(format: str, root: Path, splits: tuple[str, ...]) -> list[str]:
    """Other data of the format at a root, beside folders named like splits."""
    if not splits:
        return []
    if format == "shards":
        return sorted(path.name for path in root.glob("*.tar"))
    others = [folder for folder in visible_folders(root) if folder.name not in splits]
    found = [folder.name for folder in others if has_images(folder)]
    if format == "pairs" and has_images(root, recursive=False):
        found.append("images beside them")
    return found


def _check_clear(config: SourceConfig) -> None:
    """Refuse a root where one folder is named like a split and others are not.

    Also one with several splits by unusual names, such as Train and Val.
    """
    if config.format not in _IN_FOLDERS:
        return
    root = Path(config.root)
    folders = [folder.name for folder in visible_folders(root)]
    similar = [name for name in folders if name.lower() in _OTHER_NAMES]
    similar = [name for name in similar if _has(config.format, root, name)]
    if len(similar) > 1 and not set(similar) <= set(NAMES):
        raise DataError(
            f"data.split: {root} has {' and '.join(similar)}, named like splits (these names are "
            f"known: {', '.join(NAMES)}); set data.split to the one to read, or to . to read all"
        )
    named = tuple(name for name in NAMES if _has(config.format, root, name))
    if others := _other_data(config.format, root, named):
        more = ", ".join(others[:3]) + (", ..." if len(others) > 3 else "")
        raise DataError(
            f"data.split: {root} has {' and '.join(named)}, named like a split, beside other data "
            f"({more}); set data.split to {named[0]} to read that alone, or to . to read all"
        )
