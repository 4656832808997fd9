"""The API's responses. Requests are described by the signatures of the endpoints."""

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, Field

from leanclip.data.prompts import TEMPLATES
from leanclip.evaluation.classification import Probabilities


def _without_surrogates(value: Any) -> Any:
    """Names from a file system may have surrogates, which JSON has not."""
    return value.encode("utf-8", "replace").decode() if isinstance(value, str) else value


State = Literal["ready", "loading"]
Text = Annotated[str, BeforeValidator(_without_surrogates)]
Score = Annotated[float, AfterValidator(lambda value: round(value, 6))]


class Error(BaseModel):
    """What is wrong, in one sentence."""

    error: str


class Health(BaseModel):
    """The model's state, the images and texts it has encoded, and the passes that took."""

    status: State
    jobs: int
    passes: int


class ModelInfo(BaseModel):
    """The model that is served."""

    name: str
    resolution: int = Field(description="pixels per side")
    embed_dim: int
    context: int = Field(description="tokens")


class IndexInfo(BaseModel):
    """The index that is searched."""

    pictures: int
    labels: list[Text]


class LabelSet(BaseModel):
    """Labels to choose from; with templates if they are those of the calibration."""

    name: str
    labels: list[str]
    templates: list[str] | None = None


class About(BaseModel):
    """What the server was started with. The model is null until it is loaded."""

    version: str
    state: State
    model: ModelInfo | None = None
    index: IndexInfo | None = None
    label_sets: list[LabelSet]
    templates: Annotated[list[str], Field(description="the default, by the model's family")] = list(
        TEMPLATES
    )


class Comparison(BaseModel):
    """Cosine similarities: one row per text, one column per image."""

    texts: list[str]
    images: list[str] = Field(description="file names")
    similarity: list[list[Score]]


class Prediction(BaseModel):
    """A label with its probability and cosine similarity."""

    label: str
    probability: Score
    similarity: Score


class Classification(BaseModel):
    """The predicted labels of an image, most probable first."""

    image: str = Field(description="file name")
    calibrated: bool
    probabilities: Probabilities = Field(description="sigmoids do not add up to 1")
    none_of_these: bool = Field(description="no label fits; only if calibrated")
    predictions: list[Prediction]


class Hit(BaseModel):
    """An image of the index."""

    number: int
    score: Score
    path: Text
    caption: Text | None
    label: Text | None


class Hits(BaseModel):
    """One page of results, best first."""

    hits: list[Hit]
    is_end: bool = Field(description="there are no more")
