"""Data sets: one file per layout, the samples they give, and the loader that batches them."""

from collections.abc import Sequence

from leanclip.config import DataConfig, apply_override
from leanclip.data import folder, food101, hub, pairs, shapes, shards, table
from leanclip.data.mixture import Mixture
from leanclip.data.samples import Dataset, Sample
from leanclip.errors import ConfigError
from leanclip.settings import parse

LAYOUTS = {
    "shapes": shapes.open_dataset,
    "food101": food101.open_dataset,
    "folder": folder.open_dataset,
    "pairs": pairs.open_dataset,
    "table": table.open_dataset,
    "shards": shards.open_dataset,
    "hub": hub.open_dataset,
}


def open_dataset(config: DataConfig) -> Dataset:
    """The data set that a `data` section describes.

    Raises:
        DataError: it is missing, empty or not of its layout.
    """
    if config.layout == "mixture":
        opened = [
            open_dataset(
                config.model_copy(update=dict(source) | {"sources": (), "epoch_size": None})
            )
            for source in config.sources
        ]
        weights = [source.weight for source in config.sources if source.weight is not None]
        return Mixture(opened, weights, config.epoch_size)
    dataset = LAYOUTS[config.layout](config)
    return Mixture([dataset], epoch_size=config.epoch_size) if config.epoch_size else dataset


def split_source(words: str, *, option: str = "SRC") -> tuple[str, str]:
    """`LAYOUT:ROOT` -> both.

    Raises:
        ConfigError: it is not of that form, or there is no such layout; it names `option`.
    """
    layout, colon, root = words.partition(":")
    if not colon or layout not in LAYOUTS or not root:
        raise ConfigError(
            f"{option} {words}: not of the form LAYOUT:ROOT with a layout of: {', '.join(LAYOUTS)}"
        )
    return layout, root


def parse_source(words: str, overrides: Sequence[str] = ()) -> DataConfig:
    """`LAYOUT:ROOT`, and `key=value` for other settings of `data` -> the section.

    Raises:
        ConfigError: not of that form, or a setting is wrong.
    """
    layout, root = split_source(words)
    values = {"layout": layout, "root": root}
    for override in overrides:
        apply_override(values, override)
    return parse(DataConfig, values, where=words)


__all__ = ["LAYOUTS", "Dataset", "Sample", "open_dataset", "parse_source", "split_source"]
