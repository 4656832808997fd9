"""Data sets: one file per layout, the samples they give, and the loader that batches them."""

from collections.abc import Sequence

from leanclip.config.schema import DataConfig, MixedSource, SourceConfig, apply_override
from leanclip.config.sections import parse
from leanclip.data.dataset import Dataset, Sample
from leanclip.data.formats import folder, food101, hub, pairs, shapes, shards, table, wds
from leanclip.data.formats.mixture import Mixture
from leanclip.data.splits import default_split
from leanclip.errors import ConfigError

LAYOUTS = {
    "shapes": shapes.open_dataset,
    "food101": food101.open_dataset,
    "folder": folder.open_dataset,
    "pairs": pairs.open_dataset,
    "table": table.open_dataset,
    "shards": shards.open_dataset,
    "wds": wds.open_dataset,
    "hub": hub.open_dataset,
}


# Settings that only some layouts have a use for; elsewhere they are refused.
TAKEN_BY = {
    "templates": ("shapes", "food101", "folder", "table", "shards", "wds", "hub"),
    "class_names": ("shapes", "food101", "folder", "table", "shards", "wds", "hub"),
    "image_column": ("table", "hub"),
    "caption_column": ("table", "shards", "hub"),
    "one_caption_per_line": ("pairs", "shards", "wds"),
    "label_column": ("table", "hub"),
    "streaming": ("hub",),
}
INHERITED = (*TAKEN_BY, "split")  # of a mixture, by sources that do not set them


def open_dataset(config: DataConfig) -> Dataset:
    """The data set that a `data` section describes.

    Where it names no split, that of training is read: `leanclip.data.splits`.

    Raises:
        DataError: it is missing, empty or not of its layout.
        ConfigError: it sets what its layout has no use for.
    """
    if config.layout == "mixture":
        _check_settings(config, [source.layout for source in config.sources])
        opened = [open_dataset(source) for source in source_configs(config)]
        weights = [source.weight for source in config.sources if source.weight is not None]
        return Mixture(opened, weights, config.epoch_size)
    _check_settings(config, [config.layout])
    if config.split is None and config.layout != "hub":
        config = config.model_copy(update={"split": default_split(config)})
    dataset = LAYOUTS[config.layout](config)
    return Mixture([dataset], epoch_size=config.epoch_size) if config.epoch_size else dataset


def source_configs(config: DataConfig) -> list[DataConfig]:
    """The sources of a mixture, each as a `data` section; none of another layout.

    Raises:
        ConfigError: a source that is no stream has an epoch_size.
    """
    return [_source_config(config, source) for source in config.sources]


def _source_config(mixture: DataConfig, source: MixedSource) -> DataConfig:
    """The `data` section of one source of a mixture."""
    own = {name: getattr(source, name) for name in SourceConfig.model_fields}
    for name in INHERITED:
        if name not in source.model_fields_set and source.layout in TAKEN_BY.get(name, LAYOUTS):
            own[name] = getattr(mixture, name)
    if source.caption_column is not None:  # which of the two there is says what the data is
        own["label_column"] = source.label_column
    if source.label_column is not None:
        own["caption_column"] = None
    if source.epoch_size is not None and not own["streaming"]:
        raise ConfigError(f"data.sources: {source.root}: epoch_size goes with streaming: true only")
    own |= {"sources": (), "epoch_size": source.epoch_size}
    return mixture.model_copy(update=own)


def _check_settings(config: DataConfig, layouts: Sequence[str]) -> None:
    """Refuse settings that none of the layouts has a use for."""
    for name, takers in TAKEN_BY.items():
        is_set = getattr(config, name) != SourceConfig.model_fields[name].default
        if is_set and not set(takers) & set(layouts):
            raise ConfigError(
                f"data.{name}: is of no use with layout {' or '.join(dict.fromkeys(layouts))}, "
                f"only with {', '.join(takers)}; remove it"
            )


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


__all__ = [
    "LAYOUTS",
    "Dataset",
    "Sample",
    "open_dataset",
    "parse_source",
    "source_configs",
    "split_source",
]
