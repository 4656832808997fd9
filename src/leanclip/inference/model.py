"""A loaded model: features of images and texts, similarities, classification, ranking.

    images -> inputs.pixel_batches -> image tower -> unit features (N, E)
    texts  -> distinct ones -> tokens -> text tower -> unit features (M, E)

Results are NumPy arrays unless `as_torch` is set. Features do not depend on the batch that an image
or a text is in (within 1e-6).

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


@dataclass(frozen=True)
class InferenceModel:
    """A model with its preprocessing and tokeniser; `leanclip.load` returns one.

    Everywhere, `images` is one of: a path, a folder, a URL (http or https, which is fetched),
    bytes, a PIL image, an array (height, width, 3), a list or an iterator of these, or an array of
    four dimensions. An image that cannot be read raises a SampleError that names it.
    """

    model: CLIP = field(repr=False)
    preprocess: Preprocess  # an image -> (3, R, R) float32

    @property
    def device(self) -> torch.device:
        """The device of the model."""
        return self.model.logit_scale.device

    @property
    def dtype(self) -> torch.dtype:
        """The type of the weights; features are float32."""
        return next(self.model.parameters()).dtype

    @property
    def logit_scale(self) -> float:
        """The factor of cosines before a softmax, about 100 for trained models."""
        return float(self.model.logit_scale.detach().float().exp())

    def tokenize(self, texts: str | Sequence[str], *, truncate: bool = False) -> torch.Tensor:
        """Token ids (B, L) of texts, padded to the context length L.

        Raises:
            ConfigError: the model has fewer ids than its tokeniser.
            DataError: a text exceeds the context length, and `truncate` is false.
        """
        check_vocabulary(self.model)
        return self.model.tokenizer(texts, truncate=truncate)

    @torch.no_grad()
    def encode_image(self, pixels: torch.Tensor) -> torch.Tensor:
        """Normalised pixels (B, 3, R, R) -> image features (B, E), not of unit length."""
        parts = pixels.split(images_at_once(self.model))
        return torch.cat(
            [self.model.encode_image(part.to(self.device, self.dtype)) for part in parts]
        )

    @torch.no_grad()
    def encode_text(self, tokens: torch.Tensor) -> torch.Tensor:
        """Token ids (B, L) -> text features (B, E), not of unit length."""
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
        """Unit features of images, (N, E) float32, in their order; (1, E) for a single image.

        A progress bar is shown on stderr if there are several batches.

        Args:
            images: see the class.
            batch_size: maximum images per forward pass.
            workers: threads that decode; 0: the calling one; None: one per CPU core, at most
                eight.
            as_torch: return a tensor on the CPU instead of an array.

        Raises:
            SampleError: an image cannot be read.
            DataError: an item is not an image, or a folder has no images.
        """
        if batch_size < 1:
            raise ConfigError(f"batch_size: should be 1 or more, found {batch_size}")
        given = expand_inputs(images)
        is_short = given.total is not None and given.total <= batch_size
        features, done = [torch.empty(0, self.model.config.embed_dim)], 0
        with ProgressBar("embedding", given.total or 1, is_silent=is_short) as bar:
            for batch in self.image_batches(given.sources, batch_size, workers):
                features.append(batch)
                done += len(batch)
                bar.update(done, total=given.total or done)
        found = torch.cat(features)
        return found if as_torch else found.numpy()

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
        """Unit features of texts, (M, E) float32, in their order; (1, E) for a single text.

        Each distinct text is encoded once, without padding to the context length.

        Raises:
            DataError: a text exceeds the context length and `truncate` is false, or an item is
                not a string.
        """
        features = encode_texts(
            self.model,
            check_texts(texts),
            batch_size=batch_size,
            truncate=truncate,
            packed=isinstance(self.model, CLIP),
        )
        # Autograd does not accept tensors that were computed in inference mode.
        return features.clone() if as_torch else features.numpy()

    def similarity(
        self, images: ImageInputs, texts: str | Sequence[str], *, truncate: bool = False
    ) -> np.ndarray:
        """Cosine similarities, (M, N): one row per text, one column per image.

        Raises:
            DataError: see `embed_images` and `embed_texts`.
        """
        text_features = self.embed_texts(texts, truncate=truncate)
        return text_features @ self.embed_images(images).T

    def classifier(
        self,
        labels: Sequence[str] | str | Path,
        templates: str | Sequence[str] = TEMPLATES,
        *,
        calibration: Calibration | str | Path | None = None,
        truncate: bool = False,
    ) -> Classifier:
        """A zero-shot classifier for labels, to use many times.

        Args:
            labels: names, or a file with one label per line.
            templates: prompts with `{}` for the label; their features are averaged.
            calibration: the output of `leanclip eval --calibrate` for these weights, labels and
                templates: probabilities are calibrated, and none of the labels may match.
            truncate: cut prompts that exceed the context length.

        Raises:
            DataError: there are fewer than two different labels, an empty one, a template without
                `{}`, a prompt that exceeds the context length, or no such file.
            ConfigError: the calibration is for other weights, labels or templates.
        """
        names = check_labels(read_labels(labels) if isinstance(labels, str | Path) else labels)
        templates = [templates] if isinstance(templates, str) else templates
        check_templates(templates, where="templates")
        if isinstance(calibration, str | Path):
            calibration = Calibration.load(calibration)
        if calibration is not None:
            calibration.check(self.model, names, templates)
        packed = isinstance(self.model, CLIP)
        weights = build_classifier(self.model, names, templates, truncate=truncate, packed=packed)
        return Classifier(tuple(names), weights, self.logit_scale, calibration)

    @overload  # the overlap: a path may be that of a folder
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
        """The predictions for an image, the most probable first; for several images, a list each.

        With a calibration, an image that matches none of the labels has no predictions.

        Args:
            images: see the class; a folder is several images.
            labels: a classifier, or labels as for `classifier`.
            templates: see `classifier`; ignored if `labels` is one.
            calibration: likewise.
            top: maximum predictions per image; None: all labels.

        Raises:
            DataError: see `embed_images` and `classifier`.
        """
        given = expand_inputs(images)
        if not isinstance(labels, Classifier):
            labels = self.classifier(labels, templates, calibration=calibration)
        found = predictions(labels, self.embed_images(given.sources, as_torch=True), top)
        return found[0] if given.is_single else found

    def rank(
        self, images: ImageInputs, texts: str | Sequence[str], *, top: int | None = None
    ) -> list[RankedItem]:
        """Several images by their similarity to a text, or several texts by that to an image.

        Raises:
            ConfigError: both are single, or both are several.
            DataError: see `embed_images` and `embed_texts`.
        """
        given = expand_inputs(images)
        if given.is_single == isinstance(texts, str):
            raise ConfigError(
                "rank: give one text (a string) and several images, or one image and a list of "
                "texts; `similarity` compares all of them"
            )
        sources = list(given.sources)
        items = check_texts(texts) if given.is_single else sources
        scores = self.similarity(sources, texts).ravel()
        order = np.argsort(-scores, kind="stable")[:top]
        return [RankedItem(int(i), items[i], float(scores[i])) for i in order]

    def image_batches(
        self, images: ImageInputs, batch_size: int = 64, workers: int | None = None
    ) -> Generator[torch.Tensor, None, None]:
        """Unit features of images in batches, (B, E) float32 on the CPU.

        Raises:
            DataError: see `embed_images`.
        """
        sources = expand_inputs(images).sources
        batches = pixel_batches(sources, self.preprocess, batch_size=batch_size, workers=workers)
        yield from map(self.embed_pixels, batches)

    def embed_pixels(self, pixels: torch.Tensor) -> torch.Tensor:
        """Pixels (B, 3, R, R) uint8 -> unit features (B, E) float32 on the CPU."""
        return encode_images(self.model, pixels, self.preprocess)
