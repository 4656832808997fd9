"""The section `data`: where samples come from, and how they are prepared."""

from typing import Annotated, Any, Literal

from pydantic import (
    Field,
    SerializerFunctionWrapHandler,
    field_validator,
    model_serializer,
    model_validator,
)

from leanclip.config.sections import Section
from leanclip.config.types import (
    Fraction,
    Positive,
    PositiveFloat,
    PositiveFraction,
    Ratio,
)

Format = Literal["shapes", "food101", "folder", "pairs", "table", "shards", "wds", "hub", "mixture"]


class SourceConfig(Section):
    """Where images and captions are, and how they are arranged: docs/data.md."""

    format: Format = Field(description="how the data is arranged")
    root: str = Field(
        default="",
        description="its folder, file, pattern of shards (paths or URLs), or id on the hub",
    )
    split: str | None = Field(default=None, description="a part of it; null: the format's own")
    templates: tuple[str, ...] | None = Field(
        default=None, description="captions of class data, {} for the name; null: the format's own"
    )
    class_names: str | None = Field(
        default=None, description="a text file, a class's name a line, in the order of the labels"
    )
    image_column: str | None = Field(
        default=None, description="of a table or hub data set; null: the first usual name there is"
    )
    caption_column: str | tuple[str, ...] | None = Field(
        default=None, description="one or several, of a table, a hub data set or shards' .json"
    )
    one_caption_per_line: bool = Field(
        default=True, description="of a .txt file; false: the whole file is one caption"
    )
    label_column: str | None = Field(
        default=None, description="names the class, in place of captions; an index or a name"
    )
    streaming: bool = Field(default=False, description="read a hub data set without storing it")


class MixedSource(SourceConfig):
    """One source of a mixture; what it does not set may be inherited from the mixture."""

    weight: PositiveFloat | None = Field(
        default=None, description="its part of the samples, to the others'; null: its size"
    )
    epoch_size: Positive | None = Field(
        default=None, description="of a stream: samples that count as its size"
    )

    @model_serializer(mode="wrap")
    def _what_is_set(self, to_plain: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Without what is not set: read back, that would not be inherited any more."""
        values: dict[str, Any] = to_plain(self)
        return {name: value for name, value in values.items() if name in self.model_fields_set}

    @model_validator(mode="after")
    def _check(self) -> "MixedSource":
        if self.format == "mixture" or not self.root:
            raise ValueError("a source needs a root, and a format other than mixture")
        return self


class DataConfig(SourceConfig):
    """What training reads, and how it looks at it."""

    sources: tuple[MixedSource, ...] = Field(default=(), description="of format mixture")
    epoch_size: Positive | None = Field(
        default=None, description="samples that count as an epoch; null: as many as there are"
    )
    shuffle_buffer: Positive = Field(
        default=10_000, description="shards and streams are shuffled among so many samples"
    )
    augment: bool = Field(
        default=True,
        description="false: training sees an image as evaluation does, without random crops",
    )
    crop_scale: tuple[PositiveFraction, PositiveFraction] = Field(
        default=(0.9, 1.0), description="share of the image's area that a training crop keeps"
    )
    crop_ratio: tuple[Ratio, Ratio] = Field(
        default=(0.75, 1.3333333333333333), description="width over height of a training crop"
    )
    scaled_decoding: bool = Field(
        default=True, description="training may decode large JPEGs at a half, a quarter, an eighth"
    )
    mean: tuple[Fraction, Fraction, Fraction] = Field(
        default=(0.48145466, 0.4578275, 0.40821073), description="of RGB in [0, 1]"
    )
    std: tuple[PositiveFloat, PositiveFloat, PositiveFloat] = Field(
        default=(0.26862954, 0.26130258, 0.27577711), description="of RGB in [0, 1]"
    )
    resize: Literal["shortest", "longest", "squash"] | None = Field(
        default=None,
        description="how evaluation makes an image a square: by its short side and a crop, by its "
        "long side and a border, or regardless of its proportions; null: as the weights that are "
        "loaded, else shortest",
    )
    interpolation: Literal["nearest", "box", "bilinear", "hamming", "bicubic", "lanczos"] | None = (
        Field(
            default=None,
            description="of evaluation's resize; null: as loaded weights', else bicubic",
        )
    )
    workers: Annotated[int, Field(ge=0)] | None = Field(
        default=None,
        description="processes that read images; 0: the training process itself; "
        "null: one per CPU core, at most 8",
    )
    cache_gigabytes: PositiveFloat = Field(
        default=50,
        description="disk for shards fetched by URL, 1e9 bytes each; the least used make room",
    )
    max_bad_fraction: Fraction = Field(
        default=0.01,
        description="share of the data set that may be unusable before the run stops",
    )
    max_pixels: Annotated[int, Field(gt=0, le=178_956_970)] = Field(
        default=178_956_970,
        description="an image of more is not decoded; Pillow decodes no larger ones",
    )

    @field_validator("crop_scale", "crop_ratio")
    @classmethod
    def _in_order(cls, value: tuple[float, float]) -> tuple[float, float]:
        if value[0] > value[1]:
            raise ValueError(f"should be the least and the greatest, found {list(value)}")
        return value

    @model_validator(mode="after")
    def _check(self) -> "DataConfig":
        if (self.format == "mixture") != bool(self.sources):
            raise ValueError("sources: a list of format, root, weight; with format mixture only")
        given = [source.weight is not None for source in self.sources]
        if any(given) and not all(given):
            raise ValueError("sources: give every source a weight, or none")
        if not self.root and self.format != "mixture":
            raise ValueError("root is required and not set")
        return self
