"""Use a model: images and texts -> features -> similarities, labels, rankings.

    images -> inputs.pixel_batches -> image tower -> unit features (N, E)
    texts  -> tokens, each once    -> text tower  -> unit features (M, E)

NumPy comes out unless torch is asked for. A row of features depends on its image or text alone,
not on the batch that it was in (within rounding, 1e-6).

Shapes: N images, M texts, C labels, B batch, R resolution, L tokens, E embedding.
"""

from collections.abc import Generator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, overload

import numpy as np
import torch

from leanclip.data.dataset import check_templates
from leanclip.data.prompts import TEMPLATES
from leanclip.errors import ConfigError
from leanclip.evaluation import Calibration, build_classifier
from leanclip.evaluation.classification import Prediction
from leanclip.evaluation.features import (
    check_vocabulary,
    encode_images,
    encode_texts,
    images_at_once,
)
from leanclip.inference.classifier import (
    Classifier,
    RankedItem,
    check_labels,
    check_texts,
    predictions,
    read_labels,
)
from leanclip.inference.inputs import ImageInput, ImageInputs, expand_inputs, pixel_batches
from leanclip.io.progress import ProgressBar
from leanclip.model import CLIP
from leanclip.preprocess.images import Preprocess
from leanclip.preprocess.tokenizer import tokenize


@dataclass(frozen=True)
class InferenceModel:
    """A model with what belongs to it: how its images are prepared and its texts tokenised.

    `images` are everywhere one or several of: a path, a folder, bytes, a PIL image, an array
    (height, width, 3), or a string that is an http or https URL, which is fetched; several are a
    list, an iterator, or an array of four dimensions. What cannot be read raises a SampleError that
    names it.
    """

    model: CLIP = field(repr=False)
    preprocess: Preprocess  # an image -> (3, R, R) float32

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.model.logit_scale.device

    @property
    def dtype(self) -> torch.dtype:
        """What the towers compute in; features are float32."""
        return next(self.model.parameters()).dtype

    @property
    def logit_scale(self) -> float:
        """The factor on cosines before a softmax, about 100 for trained models."""
        return float(self.model.logit_scale.detach().float().exp())

    def tokenize(self, texts: str | Sequence[str], *, truncate: bool = False) -> torch.Tensor:
        """Token ids (B, L) of texts, L the model's context.

        Raises:
            ConfigError: the model has another tokeniser.
            DataError: a text is over the context, and `truncate` is false.
        """
        check_vocabulary(self.model)
        return tokenize(texts, self.model.context_length, truncate=truncate)

    @torch.no_grad()
    def encode_image(self, pixels: torch.Tensor) -> torch.Tensor:
        """Normalised pixels (B, 3, R, R) -> raw image features (B, E), not of unit length."""
        parts = pixels.split(images_at_once(self.model))
        return torch.cat(
            [self.model.encode_image(part.to(self.device, self.dtype)) for part in parts]
        )

    @torch.no_grad()
    def encode_text(self, tokens: torch.Tensor) -> torch.Tensor:
        """Token ids (B, L) -> raw text features (B, E), not of unit length."""
        return self.model.encode_text(tokens.to(self.device))

    @overload
    def embed_images(
        self,
        images: ImageInputs,
        *,
        batch_size: int = 64,
        workers: int | None = None,
        as_torch: Literal[False] = False,
    ) -> np.ndarray: ...
    @overload
    def embed_images(
        self,
        images: ImageInputs,
        *,
        batch_size: int = 64,
        workers: int | None = None,
        as_torch: Literal[True],
    ) -> torch.Tensor: ...
    def embed_images(
        self,
        images: ImageInputs,
        *,
        batch_size: int = 64,
        workers: int | None = None,
        as_torch: bool = False,
    ) -> np.ndarray | torch.Tensor:
        """Unit features of images, (N, E) float32, in their order; (1, E) of one.

        A bar on stderr shows how far work of several batches is.

        Args:
            images: see the class.
            batch_size: the most images that the model sees at once.
            workers: threads that decode; None: one per CPU core, eight at most; 0: none.
            as_torch: give a tensor on the CPU in place of an array.

        Raises:
            SampleError: an image cannot be read.
            DataError: something given is no image, or a folder has none.
        """
        return _given(self._image_features(images, batch_size, workers), as_torch)

    @overload
    def embed_texts(
        self,
        texts: str | Sequence[str],
        *,
        batch_size: int = 256,
        truncate: bool = False,
        as_torch: Literal[False] = False,
    ) -> np.ndarray: ...
    @overload
    def embed_texts(
        self,
        texts: str | Sequence[str],
        *,
        batch_size: int = 256,
        truncate: bool = False,
        as_torch: Literal[True],
    ) -> torch.Tensor: ...
    def embed_texts(
        self,
        texts: str | Sequence[str],
        *,
        batch_size: int = 256,
        truncate: bool = False,
        as_torch: bool = False,
    ) -> np.ndarray | torch.Tensor:
        """Unit features of texts, (M, E) float32, in their order; (1, E) of one.

        Each distinct text is encoded once, and no longer than its batch needs.

        Raises:
            DataError: a text is over the context and `truncate` does not have it cut, or
                something given is no text.
        """
        texts = check_texts(texts)
        if not texts:
            return _given(torch.empty(0, self.model.config.embed_dim), as_torch)
        features = encode_texts(
            self.model,
            texts,
            batch_size=batch_size,
            truncate=truncate,
            packed=isinstance(self.model, CLIP),
        )
        return _given(features, as_torch)

    def similarity(
        self, images: ImageInputs, texts: str | Sequence[str], *, truncate: bool = False
    ) -> np.ndarray:
        """Cosine similarities, (M, N): a row for each text, a column for each image.

        Raises:
            DataError: as `embed_images` and `embed_texts`.
        """
        texts_ = self.embed_texts(texts, truncate=truncate)
        return texts_ @ self.embed_images(images).T

    def classifier(
        self,
        labels: Sequence[str] | str | Path,
        templates: str | Sequence[str] = TEMPLATES,
        *,
        calibration: Calibration | str | Path | None = None,
        truncate: bool = False,
    ) -> Classifier:
        """The labels as a zero-shot classifier, to be used again and again.

        Args:
            labels: words, or a file with a label a line.
            templates: sentences with `{}` for the label; the mean over them is taken.
            calibration: what `leanclip eval --calibrate` wrote for these weights, labels and
                templates: probabilities then mean what they say, and none of them may fit.
            truncate: cut prompts that are over the context.

        Raises:
            DataError: fewer than two different labels, an empty one, a template without `{}`, a
                prompt over the context, or no such file.
            ConfigError: the calibration is of something else.
        """
        names = check_labels(read_labels(labels) if isinstance(labels, str | Path) else labels)
        templates = [templates] if isinstance(templates, str) else templates
        check_templates(templates, where="templates")
        if isinstance(calibration, str | Path):
            calibration = Calibration.load(calibration)
        if calibration is not None:
            calibration.check(self.model, names, templates)
        weights = build_classifier(
            self.model,
            names,
            templates,
            truncate=truncate,
            packed=isinstance(self.model, CLIP),
        )  # (C, E)
        return Classifier(tuple(names), weights, self.logit_scale, calibration)

    @overload  # a path may be a folder's too
    def classify(  # pyright: ignore[reportOverlappingOverload]
        self,
        images: ImageInput,
        labels: Classifier | Sequence[str] | str | Path,
        templates: str | Sequence[str] = TEMPLATES,
        *,
        calibration: Calibration | str | Path | None = None,
        top: int | None = None,
    ) -> list[Prediction]: ...
    @overload
    def classify(
        self,
        images: ImageInputs,
        labels: Classifier | Sequence[str] | str | Path,
        templates: str | Sequence[str] = TEMPLATES,
        *,
        calibration: Calibration | str | Path | None = None,
        top: int | None = None,
    ) -> list[list[Prediction]]: ...
    def classify(
        self,
        images: ImageInputs,
        labels: Classifier | Sequence[str] | str | Path,
        templates: str | Sequence[str] = TEMPLATES,
        *,
        calibration: Calibration | str | Path | None = None,
        top: int | None = None,
    ) -> list[Prediction] | list[list[Prediction]]:
        """Which label fits an image, the most probable first: a list for one image.

        For a list, a folder or an iterator of images it is a list of such lists. With a
        calibration, the list of an image that is none of the labels is empty.

        Args:
            images: see the class.
            labels: what `classifier` made, or words or a file that it shall be made of.
            templates: see `classifier`; of no use with one that is made.
            calibration: see `classifier`; one that is made has its own.
            top: only so many of the most probable labels.

        Raises:
            DataError: as `embed_images` and `classifier`.
        """
        is_single = expand_inputs(images).is_single
        if not isinstance(labels, Classifier):
            labels = self.classifier(labels, templates, calibration=calibration)
        found = predictions(labels, self._image_features(images), top)
        return found[0] if is_single else found

    def rank(
        self, images: ImageInputs, texts: str | Sequence[str], *, top: int | None = None
    ) -> list[RankedItem]:
        """Images in the order in which they fit one text, or texts in which they fit one image.

        Give a single text and several images, or a single image and several texts.

        Raises:
            ConfigError: both are single, or both several.
            DataError: as `embed_images` and `embed_texts`.
        """
        given = expand_inputs(images)
        if given.is_single == isinstance(texts, str):
            raise ConfigError(
                "rank: give one text (a string) and several images, or one image and a list of "
                "texts; `similarity` compares all with all"
            )
        sources = list(given.sources)
        items = check_texts(texts) if given.is_single else sources
        scores = self.similarity(sources, texts).ravel()
        order = np.argsort(-scores, kind="stable")[:top]
        return [RankedItem(int(i), items[i], float(scores[i])) for i in order]

    def image_batches(
        self, images: ImageInputs, batch_size: int = 64, workers: int | None = None
    ) -> Generator[torch.Tensor, None, None]:
        """Unit features of images batch by batch, (B, E) float32 on the CPU; nothing is kept.

        Raises:
            DataError: as `embed_images`.
        """
        for pixels in pixel_batches(
            expand_inputs(images).sources,
            self.preprocess,
            batch_size=batch_size,
            workers=workers,
        ):
            yield self.embed_pixels(pixels)

    def embed_pixels(self, pixels: torch.Tensor) -> torch.Tensor:
        """Unit features of pixels (B, 3, R, R) uint8: (B, E) float32 on the CPU."""
        return encode_images(self.model, pixels, self.preprocess)

    def _image_features(
        self, images: ImageInputs, batch_size: int = 64, workers: int | None = None
    ) -> torch.Tensor:
        if batch_size < 1:
            raise ConfigError(f"batch_size: should be 1 or more, found {batch_size}")
        given = expand_inputs(images)
        is_short = given.total is not None and given.total <= batch_size
        features, done = [torch.empty(0, self.model.config.embed_dim)], 0
        with ProgressBar("embedding", given.total or 1, is_silent=is_short) as bar:
            sources = [*given.sources] if is_short else given.sources
            for batch in self.image_batches(iter(sources), batch_size, workers):
                features.append(batch)
                done += len(batch)
                bar.update(done, total=given.total or done)
        return torch.cat(features)


@overload
def _given(features: torch.Tensor, as_torch: Literal[False]) -> np.ndarray: ...
@overload
def _given(features: torch.Tensor, as_torch: bool) -> np.ndarray | torch.Tensor: ...
def _given(features: torch.Tensor, as_torch: bool) -> np.ndarray | torch.Tensor:
    if as_torch:  # autograd takes no tensor that was made in inference mode
        return features.clone() if features.is_inference() else features
    return features.numpy()
