"""What the server answers from: the model, an index, and what was worked out before.

Shapes: E embedding.
"""

import asyncio
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from anyio.to_thread import run_sync
from starlette.requests import Request

from leanclip.app.forms import MAX_PROMPTS, Decoders, Upload, pixels_of
from leanclip.app.safety import Refused
from leanclip.app.worker import KEPT, Kept, Worker
from leanclip.data.dataset import check_templates
from leanclip.evaluation import Calibration
from leanclip.inference.classifier import Classifier, check_labels
from leanclip.search import Index


@dataclass
class Service:
    """What the server answers from."""

    worker: Worker | None  # None: there is no model, only runs
    model_name: str = ""
    label_sets: dict[str, list[str]] = field(default_factory=dict)  # by names
    calibration: Calibration | None = None
    has_index: bool = False
    opened: Index | None = None  # the index, as soon as the model is loaded
    decoders: Decoders = field(default_factory=Decoders)
    image_features: Kept = field(default_factory=Kept)
    text_features: Kept = field(default_factory=Kept)
    classifiers: Kept = field(default_factory=lambda: Kept(KEPT // 10))

    @property
    def model(self) -> Worker:
        """The model.

        Raises:
            Refused: there is none.
            NotReady: it is being loaded.
        """
        if self.worker is None:
            raise Refused(409, "no model: start the page with one: leanclip app --model ...")
        if self.worker.error is not None:
            raise Refused(500, f"the model cannot be loaded: {self.worker.error}")
        _ = self.worker.clip
        return self.worker

    @property
    def index(self) -> Index:
        """The index.

        Raises:
            Refused: there is none.
            NotReady: its model is being loaded.
        """
        if not self.has_index:
            raise Refused(409, "no index: start the page with one: leanclip app --index ...")
        _ = self.model
        assert self.opened is not None
        return self.opened

    async def image(self, upload: Upload) -> torch.Tensor:
        """Unit features (E,) of an upload."""
        worker = self.model
        resolution = worker.clip.preprocess.resolution

        def work(content: bytes) -> tuple[str, torch.Tensor | None, torch.Tensor | None]:
            key = hashlib.sha256(content).hexdigest()
            found = self.image_features.get(key)
            return key, found, pixels_of(content, resolution) if found is None else None

        key, found, pixels = await self.decoders.run(upload, work)
        if pixels is not None:
            found = await asyncio.wrap_future(worker.image(pixels))
            self.image_features.put(key, found)
        assert found is not None
        return found

    async def text(self, text: str) -> torch.Tensor:
        """Unit features (E,) of a text."""
        worker = self.model
        if (found := self.text_features.get(text)) is None:
            # One that is too long must not spoil the others' pass.
            await run_sync(worker.clip.tokenize, text)
            found = await asyncio.wrap_future(worker.text(text))
            self.text_features.put(text, found)
        return found

    async def classifier(self, labels: Sequence[str], templates: Sequence[str]) -> Classifier:
        """A classifier; calibrated where the calibration is of these labels and templates."""
        worker, key = self.model, (tuple(labels), tuple(templates))
        future = self.classifiers.get(key)
        if future is None:  # those who ask for the same meanwhile share it
            names = check_labels(labels)
            check_templates(templates, where="templates")
            if len(names) * len(templates) > MAX_PROMPTS:
                raise Refused(
                    400,
                    f"{len(names)} labels in {len(templates)} templates are over "
                    f"{MAX_PROMPTS:,} sentences; give fewer",
                )
            future = worker.classifier(names, templates)
            self.classifiers.put(key, future)
        found = await asyncio.shield(asyncio.wrap_future(future))
        if isinstance(found, Exception):
            raise found
        known = self.calibration
        if known and (known.classes, known.templates) == (found.labels, tuple(templates)):
            found = replace(found, calibration=known)
        return found


def service_of(request: Request) -> Service:
    """What the application was made with."""
    return request.app.state.service
