"""One thread that has the model; what waits for it is taken together.

    requests -> queue -> up to 64 jobs, or those of 4 ms -> by kind: one pass each -> futures

Ten people at once then cost little more than one. While a pass runs, the next jobs gather.

Shapes: R resolution, E embedding, h x w places of a map.
"""

import logging
import queue
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch.nn import functional as F

from leanclip.inference.attention_maps import gradient_map, rollout
from leanclip.inference.classifier import Classifier
from leanclip.inference.model import Clip
from leanclip.preprocess.images import normalize

log = logging.getLogger("leanclip")

MOST = 64  # jobs of a pass
WAIT = 0.004  # seconds that a first job waits for others
QUEUED = 2000  # jobs; more are refused
KEPT = 4096  # features, and a tenth as many classifiers
RETRY_AFTER = 2  # seconds

Kind = Literal["image", "text", "classifier", "map"]


class NotReady(Exception):
    """The model cannot answer now; the message says why, and it is worth trying again."""


@dataclass
class _Job:
    kind: Kind
    item: Any
    future: Future[Any] = field(default_factory=Future)


class Worker:
    """The model in a thread of its own.

    Args:
        load: gives the model; called in the thread, as it may take minutes.
        failed: called when it raises, which `error` then holds.
        wait: see WAIT.
        most: see MOST.
    """

    def __init__(
        self,
        load: Callable[[], Clip],
        *,
        failed: Callable[[], object] = lambda: None,
        wait: float = WAIT,
        most: int = MOST,
    ) -> None:
        self._load, self._failed, self._wait, self._most = load, failed, wait, most
        self._queue: queue.Queue[_Job | None] = queue.Queue()
        self._clip: Clip | None = None
        self.error: Exception | None = None
        self.jobs, self.passes = 0, 0  # done so far, to be seen at /healthz
        self._thread = threading.Thread(target=self._run, name="leanclip-model", daemon=True)

    def start(self) -> None:
        """Begin to load the model."""
        self._thread.start()

    def stop(self) -> None:
        """End after what is being worked on; what waits is told so."""
        self._queue.put(None)
        self._thread.join(10)

    @property
    def is_ready(self) -> bool:
        """Whether the model is loaded."""
        return self._clip is not None

    @property
    def clip(self) -> Clip:
        """The model, for what needs no pass of it: its resolution, its tokeniser.

        Raises:
            NotReady: it is not loaded yet.
        """
        if self._clip is None:
            raise NotReady("the model is still being loaded; try again in a moment")
        return self._clip

    def image(self, pixels: torch.Tensor) -> Future[torch.Tensor]:
        """Pixels (3, R, R) uint8 -> unit features (E,)."""
        return self._submit("image", pixels)

    def text(self, text: str) -> Future[torch.Tensor]:
        """A text within the context -> unit features (E,)."""
        return self._submit("text", text)

    def classifier(
        self, labels: Sequence[str], templates: Sequence[str]
    ) -> Future[Classifier | Exception]:
        """Labels and templates -> a classifier, or what is wrong with them."""
        return self._submit("classifier", (tuple(labels), tuple(templates)))

    def map(self, pixels: torch.Tensor, text: torch.Tensor | None) -> Future[torch.Tensor]:
        """Pixels (3, R, R) uint8 and a text's features (E,) -> where they meet, (h, w).

        Without a text: which places reach the features at all.
        """
        return self._submit("map", (pixels, text))

    def _submit(self, kind: Kind, item: object) -> Future[Any]:
        _ = self.clip
        if self._queue.qsize() >= QUEUED:
            raise NotReady("too many requests are waiting for the model; try again in a moment")
        job = _Job(kind, item)
        self._queue.put(job)
        return job.future

    def _run(self) -> None:
        try:
            self._clip = self._load()
        except Exception as error:
            self.error = error
            self._failed()
            return
        while jobs := self._next():
            for kind in _PASSES:
                if those := [job for job in jobs if job.kind == kind]:
                    self._work(kind, those)
        while not self._queue.empty():
            job = self._queue.get()
            if job is not None:
                job.future.set_exception(NotReady("the server is stopping"))

    def _next(self) -> list[_Job]:
        """The jobs of the next passes; none at the end."""
        jobs: list[_Job] = []
        deadline = float("inf")
        while len(jobs) < self._most:
            left = deadline - time.monotonic()
            try:  # what waits already is taken without waiting
                block = not jobs or (left > 0 and self._queue.empty())
                job = self._queue.get(block, timeout=left if jobs and left > 0 else None)
            except queue.Empty:
                break
            if job is None:
                self._queue.put(None)  # for the next call
                break
            if job.future.set_running_or_notify_cancel():  # not of one who has left
                jobs.append(job)
            if len(jobs) == 1:
                deadline = time.monotonic() + self._wait
        return jobs

    def _work(self, kind: Kind, jobs: list[_Job]) -> None:
        assert self._clip is not None
        try:
            results = _PASSES[kind](self._clip, [job.item for job in jobs])
        except Exception as error:
            log.exception("the model failed on %d of %s", len(jobs), kind)
            for job in jobs:
                job.future.set_exception(error)
            return
        self.jobs += len(jobs)
        self.passes += 1
        for job, result in zip(jobs, results, strict=True):
            job.future.set_result(result)


def _images(clip: Clip, items: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
    return list(clip.embed_pixels(torch.stack(list(items))))


def _texts(clip: Clip, items: Sequence[str]) -> Sequence[torch.Tensor]:
    return list(clip.embed_texts(list(items), as_torch=True))


def _classifiers(clip: Clip, items: Sequence[tuple]) -> Sequence[Classifier | Exception]:
    """One after the other: many prompts each, and kept by who asks."""
    found: list[Classifier | Exception] = []
    for labels, templates in items:
        try:
            found.append(clip.classifier(labels, templates))
        except Exception as error:
            found.append(error)
    return found


def _maps(clip: Clip, items: Sequence[tuple]) -> Sequence[torch.Tensor]:
    """Those for texts in one pass, those without in another."""
    maps: dict[int, torch.Tensor] = {}
    for is_for_text in (True, False):
        places = [i for i, (_, text) in enumerate(items) if (text is not None) == is_for_text]
        if not places:
            continue
        pixels = torch.stack([items[i][0] for i in places]).to(clip.device)
        pixels = normalize(pixels, clip.preprocess.mean, clip.preprocess.std).to(clip.dtype)
        if is_for_text:
            texts = torch.stack([items[i][1] for i in places]).to(clip.device)
            found = gradient_map(clip.model, pixels, texts)
        else:
            found = rollout(clip.model, pixels)
        maps |= dict(zip(places, found.cpu(), strict=True))
    return [maps[i] for i in range(len(items))]


_PASSES: dict[Kind, Callable[[Clip, Sequence[Any]], Sequence[Any]]] = {
    "image": _images,
    "text": _texts,
    "classifier": _classifiers,
    "map": _maps,
}


class Kept:
    """The results that were asked for last, by key; any thread may use it."""

    def __init__(self, most: int = KEPT) -> None:
        self._most, self._values, self._lock = most, OrderedDict(), threading.Lock()

    def get(self, key: object) -> Any:
        """A result, or None."""
        with self._lock:
            if key in self._values:
                self._values.move_to_end(key)
            return self._values.get(key)

    def put(self, key: object, value: object) -> None:
        """Keep a result, in place of the one that was least asked for of late."""
        with self._lock:
            self._values[key] = value
            self._values.move_to_end(key)
            if len(self._values) > self._most:
                self._values.popitem(last=False)


def mean_feature(features: Sequence[torch.Tensor]) -> torch.Tensor:
    """The unit mean (E,) of unit features (E,)."""
    return F.normalize(torch.stack(list(features)).mean(dim=0), dim=-1)
