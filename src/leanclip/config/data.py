"""The section `data`: where samples come from, and how they are prepared."""

from typing import Annotated, Any, Literal

from pydantic import (
    Field,
    SerializerFunctionWrapHandler,
    field_validator,
    model_serializer,
    model_validator,
)

from leanclip.config.sections import (
    Fraction,
    Positive,
    PositiveFloat,
    PositiveFraction,
    Ratio,
    Section,
    Size,
)

Format = Literal["shapes", "food101", "folder", "pairs", "table", "shards", "wds", "hub", "mixture"]

CaptionColumn = Annotated[
    str | tuple[str, ...] | None,
    Field(description="one or several, of a table, a hub data set or shards' .json"),
]


class Source(Section):
    """What every format has: docs/data.md."""

    format: Format = Field(description="the format of the data")
    root: str = Field(
        default="",
        description="its folder, file, pattern of shards (paths or URLs), or id on the hub",
    )
    split: str | None = Field(default=None, description="one split; null: the format's own")


class ClassSource(Source):
    """The formats `shapes`, `food101` and `folder`."""

    templates: tuple[str, ...] | None = Field(
        default=None, description="captions of class data, {} for the name; null: the format's own"
    )
    class_names: str | None = Field(
        default=None, description="a text file, one class name per line, in the order of the labels"
    )


class PairsSource(Source):
    """The format `pairs`."""

    one_caption_per_line: bool = Field(
        default=True, description="of a .txt file; false: the whole file is one caption"
    )


class TableSource(ClassSource):
    """The format `table`."""

    image_column: str | None = Field(
        default=None, description="of a table or hub data set; null: the first usual name there is"
    )
    caption_column: CaptionColumn = None
    label_column: str | None = Field(
        default=None, description="the class, in place of captions; an index or a name"
    )


class HubSource(TableSource):
    """The format `hub`."""

    streaming: bool = Field(default=False, description="read a hub data set without storing it")


class WdsSource(ClassSource, PairsSource):
    """The format `wds`."""


class ShardsSource(WdsSource):
    """The format `shards`."""

    caption_column: CaptionColumn = None


SOURCES: dict[str, type[Source]] = {
    "shapes": ClassSource,
    "food101": ClassSource,
    "folder": ClassSource,
    "pairs": PairsSource,
    "table": TableSource,
    "shards": ShardsSource,
    "wds": WdsSource,
    "hub": HubSource,
}


class SourceConfig(HubSource, ShardsSource):
    """The settings of all formats; those that a format lacks must not be set."""


class MixedSource(SourceConfig):
    """One source of a mixture; settings of its format that it does not set are the mixture's."""

    weight: PositiveFloat | None = Field(
        default=None, description="sampling weight relative to the other sources; null: its size"
    )
    epoch_size: Positive | None = Field(
        default=None, description="of a stream: samples that count as its size"
    )

    @model_serializer(mode="wrap")
    def _only_set(self, to_plain: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Only what is set: a default that is written out would not be inherited when read back."""
        values: dict[str, Any] = to_plain(self)
        return {name: value for name, value in values.items() if name in self.model_fields_set}

    @model_validator(mode="after")
    def _check(self) -> "MixedSource":
        if self.format == "mixture" or not self.root:
            raise ValueError("a source needs a root, and a format other than mixture")
        return self


class DataConfig(SourceConfig):
    """The training data, and how it is read and preprocessed."""

    sources: tuple[MixedSource, ...] = Field(default=(), description="of format mixture")
    epoch_size: Positive | None = Field(
        default=None, description="samples per epoch; null: the size of the data"
    )
    shuffle_buffer: Positive = Field(
        default=10_000, description="shards and streams are shuffled in blocks of this many samples"
    )
    augment: bool = Field(
        default=True,
        description="false: training preprocesses images as evaluation does, without random crops",
    )
    crop_scale: tuple[PositiveFraction, PositiveFraction] = Field(
        default=(0.9, 1.0),
        description="range of the fraction of the image's area that a training crop covers",
    )
    crop_ratio: tuple[Ratio, Ratio] = Field(
        default=(0.75, 1.3333333333333333), description="range of width / height of a training crop"
    )
    scaled_decoding: bool = Field(
        default=True, description="training may decode large JPEGs at 1/2, 1/4 or 1/8 of their size"
    )
    mean: tuple[Fraction, Fraction, Fraction] | None = Field(
        default=None, description="of RGB in [0, 1]; null: as the loaded weights, else OpenAI's"
    )
    std: tuple[PositiveFloat, PositiveFloat, PositiveFloat] | None = Field(
        default=None, description="of RGB in [0, 1]; null: as the loaded weights, else OpenAI's"
    )
    resize: Literal["shortest", "longest", "squash", "naflex"] | None = Field(
        default=None,
        description="how evaluation makes an image square: resize the short side and crop, resize "
        "the long side and pad, or resize both sides (squash); naflex: images keep their "
        "proportions, for models with vision_positions resized; null: as the loaded weights, "
        "else shortest",
    )
    patches: tuple[Size, ...] | None = Field(
        default=None,
        description="with resize naflex: patches of an image at most; several: training draws one "
        "for each batch, evaluation uses the largest; null: as the loaded weights, else those of "
        "a square of the model's resolution",
    )
    interpolation: Literal["nearest", "box", "bilinear", "hamming", "bicubic", "lanczos"] | None = (
        Field(
            default=None,
            description="of evaluation's resize; null: as the loaded weights, else bicubic",
        )
    )
    workers: Annotated[int, Field(ge=0)] | None = Field(
        default=None,
        description="processes that read images; 0: the training process itself; "
        "null: one per CPU core, at most 8",
    )
    cache_gigabytes: PositiveFloat = Field(
        default=50,
        description="disk cache of shards fetched by URL, in units of 1e9 bytes; the least "
        "recently used are evicted",
    )
    max_bad_fraction: Fraction = Field(
        default=0.01,
        description="fraction of bad samples above which a run ends with an error",
    )
    max_pixels: Annotated[int, Field(gt=0, le=178_956_970)] = Field(
        default=178_956_970,
        description="larger images are not decoded; Pillow decodes none above the default",
    )

    @field_validator("crop_scale", "crop_ratio")
    @classmethod
    def _in_order(cls, value: tuple[float, float]) -> tuple[float, float]:
        if value[0] > value[1]:
            raise ValueError(f"should be in ascending order, found {list(value)}")
        return value

    @model_validator(mode="after")
    def _check(self) -> "DataConfig":
        if (self.format == "mixture") != bool(self.sources):
            raise ValueError("sources: a list of format, root, weight; with format mixture only")
        if self.patches is not None and len({*self.patches}) != max(1, len(self.patches)):
            raise ValueError(f"patches: should be different numbers, found {list(self.patches)}")
        given = [source.weight is not None for source in self.sources]
        if any(given) and not all(given):
            raise ValueError("sources: give every source a weight, or none")
        if not self.root and self.format != "mixture":
            raise ValueError("root is required and not set")
        return self
