"""Data sets: one file per format, the samples they give, and the loader that batches them."""

from collections.abc import Sequence

from leanclip.config.data import DataConfig, MixedSource, SourceConfig
from leanclip.config.schema import apply_override
from leanclip.config.sections import parse
from leanclip.data.dataset import Dataset, Sample
from leanclip.data.formats import folder, food101, hub, pairs, shapes, shards, table, wds
from leanclip.data.formats.mixture import Mixture
from leanclip.data.splits import default_split
from leanclip.errors import ConfigError

FORMATS = {
    "shapes": shapes.open_dataset,
    "food101": food101.open_dataset,
    "folder": folder.open_dataset,
    "pairs": pairs.open_dataset,
    "table": table.open_dataset,
    "shards": shards.open_dataset,
    "wds": wds.open_dataset,
    "hub": hub.open_dataset,
}


# Settings that only some formats have a use for; elsewhere they are refused.
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
        DataError: it is missing, empty or not of its format.
        ConfigError: it sets what its format has no use for.
    """
    if config.format == "mixture":
        _check_settings(config, [source.format for source in config.sources])
        opened = [open_dataset(source) for source in source_configs(config)]
        weights = [source.weight for source in config.sources if source.weight is not None]
        return Mixture(opened, weights, config.epoch_size)
    _check_settings(config, [config.format])
    if config.split is None and config.format != "hub":
        config = config.model_copy(update={"split": default_split(config)})
    dataset = FORMATS[config.format](config)
    return Mixture([dataset], epoch_size=config.epoch_size) if config.epoch_size else dataset


def source_configs(config: DataConfig) -> list[DataConfig]:
    """The sources of a mixture, each as a `data` section; none of another format.

    Raises:
        ConfigError: a source that is no stream has an epoch_size.
    """
    return [_source_config(config, source) for source in config.sources]


def _source_config(mixture: DataConfig, source: MixedSource) -> DataConfig:
    """The `data` section of one source of a mixture."""
    own = {name: getattr(source, name) for name in SourceConfig.model_fields}
    for name in INHERITED:
        if name not in source.model_fields_set and source.format in TAKEN_BY.get(name, FORMATS):
            own[name] = getattr(mixture, name)
    if source.caption_column is not None:  # which of the two there is says what the data is
        own["label_column"] = source.label_column
    if source.label_column is not None:
        own["caption_column"] = None
    if source.epoch_size is not None and not own["streaming"]:
        raise ConfigError(f"data.sources: {source.root}: epoch_size goes with streaming: true only")
    own |= {"sources": (), "epoch_size": source.epoch_size}
    return mixture.model_copy(update=own)


def _check_settings(config: DataConfig, formats: Sequence[str]) -> None:
    """Refuse settings that none of the formats has a use for."""
    for name, takers in TAKEN_BY.items():
        is_set = getattr(config, name) != SourceConfig.model_fields[name].default
        if is_set and not set(takers) & set(formats):
            raise ConfigError(
                f"data.{name}: is of no use with format {' or '.join(dict.fromkeys(formats))}, "
                f"only with {', '.join(takers)}; remove it"
            )


def split_source(words: str, *, option: str = "SRC") -> tuple[str, str]:
    """`FORMAT:ROOT` -> both.

    Raises:
        ConfigError: it is not of that form, or there is no such format; it names `option`.
    """
    format, colon, root = words.partition(":")
    if not colon or format not in FORMATS or not root:
        raise ConfigError(
            f"{option} {words}: not of the form FORMAT:ROOT with a format of: {', '.join(FORMATS)}"
        )
    return format, root


def parse_source(words: str, overrides: Sequence[str] = ()) -> DataConfig:
    """`FORMAT:ROOT`, and `key=value` for other settings of `data` -> the section.

    Raises:
        ConfigError: not of that form, or a setting is wrong.
    """
    format, root = split_source(words)
    values = {"format": format, "root": root}
    for override in overrides:
        apply_override(values, override)
    return parse(DataConfig, values, where=words)


__all__ = [
    "FORMATS",
    "Dataset",
    "Sample",
    "open_dataset",
    "parse_source",
    "source_configs",
    "split_source",
]
