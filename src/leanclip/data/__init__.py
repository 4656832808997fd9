"""Data sets: one file per format, and the loader that batches their samples."""

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


# Settings that only some formats use; with others they are an error.
TAKEN_BY = {
    "templates": ("shapes", "food101", "folder", "table", "shards", "wds", "hub"),
    "class_names": ("shapes", "food101", "folder", "table", "shards", "wds", "hub"),
    "image_column": ("table", "hub"),
    "caption_column": ("table", "shards", "hub"),
    "one_caption_per_line": ("pairs", "shards", "wds"),
    "label_column": ("table", "hub"),
    "streaming": ("hub",),
}
INHERITED = (*TAKEN_BY, "split")  # by sources of a mixture that do not set them


def open_dataset(config: DataConfig) -> Dataset:
    """The data set that a `data` section describes.

    Without a split, the training split is read: `leanclip.data.splits`.

    Raises:
        DataError: it is missing, empty or not of its format.
        ConfigError: a setting does not apply to its format.
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
    """The sources of a mixture, each as a `data` section; empty for other formats.

    Raises:
        ConfigError: a source that is not a stream has an epoch_size.
    """
    return [_source_config(config, source) for source in config.sources]


def _source_config(mixture: DataConfig, source: MixedSource) -> DataConfig:
    """The `data` section of one source of a mixture."""
    own = {name: getattr(source, name) for name in SourceConfig.model_fields}
    for name in INHERITED:
        if name not in source.model_fields_set and source.format in TAKEN_BY.get(name, FORMATS):
            own[name] = getattr(mixture, name)
    if source.caption_column is not None:  # captions, not classes
        own["label_column"] = source.label_column
    if source.label_column is not None:
        own["caption_column"] = None
    if source.epoch_size is not None and not own["streaming"]:
        raise ConfigError(f"data.sources: {source.root}: epoch_size goes with streaming: true only")
    own |= {"sources": (), "epoch_size": source.epoch_size}
    return mixture.model_copy(update=own)


def _check_settings(config: DataConfig, formats: Sequence[str]) -> None:
    """Refuse settings that apply to none of the formats."""
    for name, takers in TAKEN_BY.items():
        is_set = getattr(config, name) != SourceConfig.model_fields[name].default
        if is_set and not set(takers) & set(formats):
            raise ConfigError(
                f"data.{name}: does not apply to format "
                f"{' or '.join(dict.fromkeys(formats))}, only to {', '.join(takers)}; remove it"
            )


def split_source(words: str, *, option: str = "SRC") -> tuple[str, str]:
    """Split `FORMAT:ROOT`.

    Raises:
        ConfigError: not of that form, or no such format; the message names `option`.
    """
    format, colon, root = words.partition(":")
    if not colon or format not in FORMATS or not root:
        raise ConfigError(
            f"{option} {words}: not of the form FORMAT:ROOT with a format of: {', '.join(FORMATS)}"
        )
    return format, root


def parse_source(words: str, overrides: Sequence[str] = ()) -> DataConfig:
    """The `data` section of `FORMAT:ROOT`, and `key=value` for other settings.

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
