"""Which splits a data set has, by its layout or by what lies at its root."""

import json
from pathlib import Path

from leanclip.config.schema import SourceConfig
from leanclip.data.formats import table

FIXED = {"shapes": ("train", "val", "unseen"), "food101": ("train", "test")}
NAMES = ("train", "val", "valid", "validation", "dev", "test")  # of folders and files


def find_splits(config: SourceConfig) -> tuple[str, ...]:
    """The names of the splits at `config.root`, whichever is set; none where nothing tells."""
    if config.layout in FIXED:
        return FIXED[config.layout]
    root = Path(config.root)
    return tuple(name for name in NAMES if _has(config.layout, root, name))


def _has(layout: str, root: Path, name: str) -> bool:
    if layout in ("pairs", "folder"):
        return (root / name).is_dir()
    if layout in ("shards", "wds"):
        return any((root / name).glob("*.tar"))
    if layout == "table":
        return root.is_dir() and bool(table.split_files(root, name))
    # Of a data set on the hub only the network could tell.
    saved = root / "dataset_dict.json"
    return (
        layout == "hub"
        and saved.is_file()
        and name in json.loads(saved.read_text("utf-8"))["splits"]
    )
