"""The section `evaluate`: which tasks are measured, on what and when."""

from pydantic import (
    Field,
)

from leanclip.config.data import Format
from leanclip.config.sections import Section
from leanclip.config.types import (
    Positive,
)


class EvaluationData(Section):
    """A data set to evaluate on; what is not given is as in `data`."""

    format: Format | None = Field(default=None, description="null: data.format")
    root: str | None = Field(default=None, description="null: data.root")
    split: str | None = Field(
        default=None,
        description="null: the format's own for evaluation; of data's root: val, valid, "
        "validation, test or dev, the first there is, if training uses another split",
    )
    templates: tuple[str, ...] | None = Field(
        default=None, description="prompts, averaged per class; null: the format's own"
    )
    class_names: str | None = Field(
        default=None, description="null: data.class_names, if format and root are data's"
    )
    image_column: str | None = Field(default=None, description="null: as class_names")
    caption_column: str | tuple[str, ...] | None = Field(
        default=None, description="null: as class_names, unless label_column is set"
    )
    label_column: str | None = Field(
        default=None, description="null: as class_names, unless caption_column is set"
    )
    one_caption_per_line: bool | None = Field(default=None, description="null: as class_names")
    limit: Positive | None = Field(
        default=None,
        description="measure a sample of this many images with all their captions; it is the same "
        "for every model and seed; null: all",
    )


class ProbeData(EvaluationData):
    """Class data for a probe, which learns from another split of it."""

    train_split: str | None = Field(
        default=None,
        description='what the probe learns from; null: "train" where there is one, else a half '
        "of each class",
    )
    shots: Positive | None = Field(
        default=None, description="images of each class that it learns from; null: all"
    )


class NeighbourData(EvaluationData):
    """Class data for a k-NN probe."""

    train_split: str | None = Field(default=None, description="as of linear_probe")
    k: Positive = Field(default=20, description="neighbours that vote")


class EvaluateConfig(Section):
    """What is measured at the end, and on the way."""

    every_epochs: Positive | None = Field(
        default=None, description="epochs between two; null: at the end"
    )
    batch_size: Positive = Field(default=256, description="most images or texts per forward pass")
    pictures: bool = Field(default=True, description="draw what was measured, and the curves")
    zero_shot: EvaluationData | None = Field(
        default=None, description="class data; null: not measured"
    )
    retrieval: EvaluationData | None = Field(default=None, description="pairs; null: not measured")
    linear_probe: ProbeData | None = Field(
        default=None, description="class data, with labels to learn from; null: not measured"
    )
    knn: NeighbourData | None = Field(default=None, description="the same for nearest neighbours")
    retention: EvaluationData | None = Field(
        default=None,
        description="what must not be forgotten, class data or pairs; measured before training too",
    )
    patience: Positive | None = Field(
        default=None,
        description="evaluations without a gain of checkpoint.best_metric that end the run; null: "
        "it goes to its end",
    )
