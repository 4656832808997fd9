"""Uploads, and features and classifiers from the model or from a cache.

Images arrive as the bytes of an upload and in no other way: no path and no URL is accepted.

Shapes: R resolution, E embedding.
"""

import asyncio
import hashlib
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, TypeVar

import numpy as np
import torch
from anyio.to_thread import run_sync
from fastapi import HTTPException, UploadFile
from PIL import Image

from leanclip.app.schemas import LabelSet
from leanclip.app.worker import Worker, embed_images, embed_texts
from leanclip.data.dataset import check_templates
from leanclip.errors import SampleError
from leanclip.evaluation import Calibration
from leanclip.evaluation.classification import chosen_probabilities
from leanclip.inference.classifier import Classifier, check_labels
from leanclip.preprocess.decoding import open_image
from leanclip.preprocess.images import evaluation_pixels
from leanclip.search import Index

T = TypeVar("T")

MAX_PIXELS = 50_000_000  # per image: 150 MB when decoded
MAX_PROMPTS = 2000  # labels times templates
CACHE_SIZE = 4096  # features
DECODERS = min(4, os.cpu_count() or 1)  # uploads in memory at once


class Cache(dict[Any, Any]):
    """At most `size` values; the oldest one makes room for a new one."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size

    def __setitem__(self, key: Any, value: Any) -> None:
        super().__setitem__(key, value)
        if len(self) > self.size:
            del self[next(iter(self))]


@dataclass
class Service:
    """The model, what the server was started with, and the caches."""

    worker: Worker
    model_name: str = ""
    label_sets: list[LabelSet] = field(default_factory=list)
    calibration: Calibration | None = None
    index: Index | None = None
    decoders: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(DECODERS))
    image_features: Cache = field(default_factory=lambda: Cache(CACHE_SIZE))
    text_features: Cache = field(default_factory=lambda: Cache(CACHE_SIZE))
    classifiers: Cache = field(default_factory=lambda: Cache(CACHE_SIZE // 10))

    async def decode(self, upload: UploadFile, work: Callable[[bytes], T]) -> T:
        """Apply `work` to the bytes of an upload, in a thread."""

        def read() -> T:
            upload.file.seek(0)
            return work(upload.file.read())

        try:
            return await asyncio.get_running_loop().run_in_executor(self.decoders, read)
        except SampleError as error:
            message = str(error).removeprefix("<bytes>: ")
            raise HTTPException(422, f"{file_name(upload)}: {message}") from None

    async def image(self, upload: UploadFile) -> torch.Tensor:
        """Unit features (E,) of an image."""
        key = await self.decode(upload, lambda content: hashlib.sha256(content).digest())
        if (features := self.image_features.get(key)) is None:
            pixels = await self.decode(upload, self.to_pixels)
            features = await self.worker.run(embed_images, pixels)
            self.image_features[key] = features
        return features

    def to_pixels(self, content: bytes) -> np.ndarray:
        """What the model sees, as `evaluation_pixels`."""
        return evaluation_pixels(content, self.worker.clip.preprocess, max_pixels=MAX_PIXELS)

    async def text(self, text: str) -> torch.Tensor:
        """Unit features (E,) of a text."""
        if (features := self.text_features.get(text)) is None:
            # Checked here: in a batch, a text that is too long would fail the others.
            await run_sync(self.worker.clip.tokenize, text)
            features = await self.worker.run(embed_texts, text)
            self.text_features[text] = features
        return features

    async def classifier(
        self, labels: list[str], templates: list[str], probabilities: str | None = None
    ) -> Classifier:
        """A classifier; calibrated if the calibration is for these labels and templates."""
        clip = self.worker.clip
        kind = chosen_probabilities(probabilities, clip.logit_bias)
        key = (tuple(labels), tuple(templates), kind)
        if (task := self.classifiers.get(key)) is None:
            names = check_labels(labels, at_least=2 if kind == "softmax" else 1)
            check_templates(templates, where="templates")
            if len(names) * len(templates) > MAX_PROMPTS:
                found = f"{len(names)} labels in {len(templates)} templates"
                raise HTTPException(400, f"{found} are over {MAX_PROMPTS:,} prompts; give fewer")
            # A task, which concurrent requests for the same labels share.
            make = partial(clip.classifier, probabilities=kind)
            work = self.worker.call(make, names, templates)
            task = asyncio.ensure_future(work)
            self.classifiers[key] = task
        try:
            classifier = await asyncio.shield(task)
        except Exception:
            self.classifiers.pop(key, None)
            raise
        known = None if probabilities == "sigmoid" else self.calibration
        if known and (known.classes, known.templates) == (classifier.labels, tuple(templates)):
            return replace(classifier, calibration=known)
        return classifier


def to_image(content: bytes) -> Image.Image:
    """The upright image in RGB."""
    return open_image(content, max_pixels=MAX_PIXELS)


def file_name(upload: UploadFile) -> str:
    """The name of an uploaded file, without folders."""
    return (upload.filename or "image").replace("\\", "/").rpartition("/")[2][:80]
