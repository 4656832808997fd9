"""Data sets: one file per format, the samples they give, and the loader that batches them."""

from collections.abc import Sequence

from leanclip.config.data import SOURCES, DataConfig, MixedSource, SourceConfig
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


def open_dataset(config: DataConfig) -> Dataset:
    """The data set of a `data` section; without a split, that of training (splits.py).

    Raises:
        DataError: it is missing, empty or not of its format.
        ConfigError: a setting that its format does not have is set.
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
        ConfigError: a source that is not a stream has an epoch_size.
    """
    return [_source_config(config, source) for source in config.sources]


def _source_config(mixture: DataConfig, source: MixedSource) -> DataConfig:
    own = {name: getattr(source, name) for name in SourceConfig.model_fields}
    for name in SOURCES[source.format].model_fields:
        if name not in ("format", "root", *source.model_fields_set):
            own[name] = getattr(mixture, name)
    # One of these two columns says whether the source is captions or class data.
    if source.caption_column is not None:
        own["label_column"] = source.label_column
    if source.label_column is not None:
        own["caption_column"] = None
    if source.epoch_size is not None and not own["streaming"]:
        raise ConfigError(f"data.sources: {source.root}: epoch_size goes with streaming: true only")
    own |= {"sources": (), "epoch_size": source.epoch_size}
    return mixture.model_copy(update=own)


def _check_settings(config: DataConfig, formats: Sequence[str]) -> None:
    """Refuse settings that none of the formats has."""
    known = {name for format in formats for name in SOURCES[format].model_fields}
    for name, field in SourceConfig.model_fields.items():
        if name not in known and getattr(config, name) != field.default:
            others = [format for format, source in SOURCES.items() if name in source.model_fields]
            raise ConfigError(
                f"data.{name}: is of no use with format {' or '.join(dict.fromkeys(formats))}, "
                f"only with {', '.join(others)}; remove it"
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
