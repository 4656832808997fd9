"""Runs the model on batches of waiting requests.

requests -> one open batch per function -> full (64), or 4 ms after the first -> one forward pass

Ten concurrent requests then cost little more than one. While one batch runs, the next one fills.

Shapes: R resolution, E embedding, h x w cells of a map.
"""

import asyncio
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

import numpy as np
import torch
from fastapi import HTTPException

from leanclip.app.schemas import State
from leanclip.inference.attention_maps import gradient_map, rollout
from leanclip.inference.model import InferenceModel
from leanclip.preprocess.images import normalize

T = TypeVar("T")
Pass = Callable[[InferenceModel, Sequence[Any]], Sequence[torch.Tensor]]

MAX_BATCH = 64  # items
MAX_WAIT = 0.004  # seconds that the first item of a batch waits for others
MAX_PENDING = 4000  # items
RETRY_AFTER = {"retry-after": "2"}  # seconds


class Worker:
    """The model, which one thread runs; the rest happens in the server's event loop.

    Args:
        load: returns the model.
        max_wait, max_batch: see MAX_WAIT and MAX_BATCH.
    """

    def __init__(
        self,
        load: Callable[[], InferenceModel],
        *,
        max_wait: float = MAX_WAIT,
        max_batch: int = MAX_BATCH,
    ) -> None:
        self._load, self._max_wait, self._max_batch = load, max_wait, max_batch
        self.loaded: Future[InferenceModel] = Future()
        self.jobs, self.passes, self._pending = 0, 0, 0
        self._open: dict[Pass, tuple[list[Any], asyncio.Task]] = {}  # batches that take items
        self._turn = asyncio.Lock()
        self._thread = ThreadPoolExecutor(1)

    def start(self, failed: Callable[[], object] = lambda: None) -> None:
        """Load the model in a daemon thread, as that may take minutes."""

        def load() -> None:
            try:
                self.loaded.set_result(self._load())
            except BaseException as error:
                self.loaded.set_exception(error)
                failed()

        threading.Thread(target=load, daemon=True).start()

    @property
    def state(self) -> State:
        """Whether the model is loaded; if it cannot be, the server stops."""
        return "ready" if self.loaded.done() and not self.loaded.exception() else "loading"

    @property
    def clip(self) -> InferenceModel:
        """The model; an HTTPException unless it is loaded."""
        if self.state == "loading":
            raise HTTPException(503, "the model is being loaded; try again shortly", RETRY_AFTER)
        return self.loaded.result()

    async def run(self, model_pass: Pass, item: Any) -> torch.Tensor:
        """The result of `model_pass`, one of the functions below, for an item in a batch."""
        _ = self.clip
        if self._pending >= MAX_PENDING:
            raise HTTPException(503, "too many requests; try again shortly", RETRY_AFTER)
        self._pending += 1
        if model_pass not in self._open:
            items = []
            self._open[model_pass] = items, asyncio.create_task(self._run(model_pass, items))
        items, batch = self._open[model_pass]
        items.append(item)
        index = len(items) - 1
        if len(items) == self._max_batch:
            del self._open[model_pass]
        return (await asyncio.shield(batch))[index]

    async def _run(self, model_pass: Pass, items: list[Any]) -> Sequence[torch.Tensor]:
        try:
            await asyncio.sleep(self._max_wait)
            async with self._turn:  # until it is this batch's turn, it takes more items
                if len(items) < self._max_batch:
                    del self._open[model_pass]
                results = await self.call(model_pass, self.clip, items)
            self.jobs += len(items)
            return results
        finally:
            self._pending -= len(items)

    async def call(self, function: Callable[..., T], *values: Any) -> T:
        """Call a function in the model's thread."""
        self.passes += 1
        return await asyncio.get_running_loop().run_in_executor(self._thread, function, *values)


def embed_images(clip: InferenceModel, items: Sequence[np.ndarray]) -> Sequence[torch.Tensor]:
    """Pixels (3, R, R) uint8 -> unit features (E,)."""
    return list(clip.embed_pixels(clip.preprocess.stack(items)))


def embed_texts(clip: InferenceModel, items: Sequence[str]) -> Sequence[torch.Tensor]:
    """Texts within the context -> unit features (E,)."""
    return list(clip.embed_texts(list(items), as_torch=True))


def gradient_maps(clip: InferenceModel, items: Sequence[tuple]) -> Sequence[torch.Tensor]:
    """Pixels (3, R, R) uint8, each with unit text features (E,) -> maps (h, w) for the texts."""
    pixels, texts = zip(*items, strict=True)
    texts = torch.stack(texts).to(clip.device)
    batches = normalized(clip, pixels)
    pairs = zip(batches, texts.split(len(batches[0])), strict=True)
    return [one for batch, text in pairs for one in gradient_map(clip.model, batch, text).cpu()]


def rollouts(clip: InferenceModel, items: Sequence[np.ndarray]) -> Sequence[torch.Tensor]:
    """Pixels (3, R, R) uint8 -> text-independent maps (h, w)."""
    return [one for part in normalized(clip, items) for one in rollout(clip.model, part).cpu()]


def normalized(clip: InferenceModel, pixels: Sequence[np.ndarray]) -> list[torch.Tensor]:
    """Pixels (3, R, R) uint8 -> the model's input (B, 3, R, R); of naflex, image by image."""
    count = 1 if clip.preprocess.is_naflex else len(pixels)
    batches = [np.stack(pixels[n : n + count]) for n in range(0, len(pixels), count)]
    mean, std = clip.preprocess.mean, clip.preprocess.std
    return [
        normalize(torch.from_numpy(batch).to(clip.device), mean, std).to(clip.dtype)
        for batch in batches
    ]
