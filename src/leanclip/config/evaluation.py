"""The section `evaluate`: which tasks are evaluated, on what data and when."""

from typing import Literal

from pydantic import Field

from leanclip.config.data import Format
from leanclip.config.sections import Positive, Section


class EvaluationData(Section):
    """A data set to evaluate on; settings that are null are those of `data`."""

    format: Format | None = Field(default=None, description="null: data.format")
    root: str | None = Field(default=None, description="null: data.root")
    split: str | None = Field(
        default=None,
        description="null: the format's own for evaluation; with data's root the first existing "
        "one of val, valid, validation, test and dev that training does not use",
    )
    templates: tuple[str, ...] | None = Field(
        default=None, description="prompts, averaged per class; null: the format's own"
    )
    probabilities: Literal["sigmoid", "softmax"] | None = Field(
        default=None,
        description="of the classes; null: sigmoid if the model has a logit bias, else softmax",
    )
    class_names: str | None = Field(
        default=None, description="null: data.class_names, if format and root are those of data"
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
        description="evaluate on a random sample of this many images with all their captions, the "
        "same for every model and seed; null: all",
    )


class ProbeData(EvaluationData):
    """Class data for a linear probe, which is fitted on another split of it."""

    train_split: str | None = Field(
        default=None,
        description='the split the probe is fitted on; null: "train" if it exists, else half of '
        "each class",
    )
    shots: Positive | None = Field(default=None, description="training images per class; null: all")


class NeighbourData(EvaluationData):
    """Class data for a k-NN probe."""

    train_split: str | None = Field(default=None, description="as for linear_probe")
    k: Positive = Field(default=20, description="neighbours that vote")


class EvaluateConfig(Section):
    """What is evaluated after training, and during it."""

    every_epochs: Positive | None = Field(
        default=None, description="epochs between evaluations; null: only after training"
    )
    batch_size: Positive = Field(default=256, description="images or texts per forward pass")
    pictures: bool = Field(
        default=True, description="write pictures of the results and of the training curves"
    )
    zero_shot: EvaluationData | None = Field(
        default=None, description="class data; null: not evaluated"
    )
    retrieval: EvaluationData | None = Field(default=None, description="pairs; null: not evaluated")
    linear_probe: ProbeData | None = Field(
        default=None, description="class data; null: not evaluated"
    )
    knn: NeighbourData | None = Field(
        default=None, description="class data for k nearest neighbours; null: not evaluated"
    )
    retention: EvaluationData | None = Field(
        default=None,
        description="a benchmark of abilities to retain, class data or pairs; evaluated before "
        "training too",
    )
    patience: Positive | None = Field(
        default=None,
        description="early stopping: evaluations without improvement of checkpoint.best_metric "
        "that end the run; null: none",
    )
