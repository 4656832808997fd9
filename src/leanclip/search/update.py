"""Bring an index to what its sources are now.

    sources -> entries -> what is new or changed -> threads read and decode -> features
            -> vectors (an fp16 file), then items (SQLite), committed together every so often

A picture is in the index as soon as its row is committed, and its vector is on the disk before
that: killed at any moment, it holds whole pictures, and the next run goes on.

Shapes: E embedding.
"""

import logging
import os
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from leanclip.data.skipped import Bad, SkipTracker
from leanclip.errors import DataError, SampleError, escaped
from leanclip.inference.model import InferenceModel
from leanclip.io.progress import ProgressBar
from leanclip.io.threads import in_threads
from leanclip.search.items import Entry, Items
from leanclip.search.sources import Found, Source, read, with_caption
from leanclip.search.vectors import Vectors

log = logging.getLogger("leanclip")

MAX_PENDING = 1024  # pictures, or
MAX_SECONDS = 5.0  # between two commits
MAX_NAMED = 20  # of what cannot be read


@dataclass
class Changes:
    """What an update came to."""

    added: int = 0  # files, as all below
    changed: int = 0
    dropped: int = 0
    unchanged: int = 0
    skipped: int = 0  # cannot be read
    files: int = 0
    pictures: int = 0  # of different content


class Update:
    """One run through the sources of an index."""

    def __init__(
        self,
        items: Items,
        vectors: Vectors,
        clip: InferenceModel,
        batch_size: int,
        workers: int | None,
        max_bad_fraction: float,
    ) -> None:
        self.items, self.vectors, self.clip = items, vectors, clip
        self.batch_size, self.workers, self.max_bad_fraction = batch_size, workers, max_bad_fraction
        used = self.items.numbers()
        self.free = iter(np.flatnonzero(used == 0).tolist())  # of pictures dropped before this run
        self.end = len(used)
        self.kept: set[int] = set()  # ids of items
        self.outdated: set[str] = set()  # paths
        self.pending: list[tuple[Entry, bytes, np.ndarray | None]] = []
        self.digests: set[bytes] = set()  # of those
        self.committed = time.monotonic()
        self.changes = Changes()

    def run(self, sources: Sequence[Source]) -> Changes:
        """Bring the index to what is there."""
        listings = [source.entries() for source in sources]
        total = sum(count for count, _ in listings)
        tracker = SkipTracker(total, self.max_bad_fraction, option="--max-bad-fraction")
        preprocess = self.clip.preprocess

        def work(_: int, one: tuple[Entry, np.ndarray | None]) -> Found | tuple[str, SampleError]:
            try:
                return read(*one, preprocess, self._is_known)
            except SampleError as error:
                return one[0].path, error

        new = (one for _, entries in listings for one in self._new(entries))
        batch: list[Found] = []
        with ProgressBar("indexing", max(total, 1)) as bar:
            for done, one in enumerate(in_threads(work, new, self.workers, self.batch_size), 1):
                if isinstance(one, Found):
                    batch.append(one)
                else:
                    self._skip(*one, tracker)
                if len(batch) == self.batch_size:
                    self._embed(batch)
                    batch = []
                bar.update(done + self.changes.unchanged)
            self._embed(batch)
            self._commit()
        self.changes.dropped = self.items.drop_all_but(self.kept)
        self.items.drop_pictures_without_items()
        self.changes.files, self.changes.pictures = self.items.count_items(), self.items.count()
        return self.changes

    def _new(
        self, entries: Iterable[tuple[Entry, np.ndarray | None]]
    ) -> Iterator[tuple[Entry, np.ndarray | None]]:
        """What must be read; of what is as it was, a new caption or label is noted."""
        for entry, features in entries:
            known = self.items.known(entry.path)
            if known is None:
                yield entry, features
            elif known[2:5] != (entry.size, entry.mtime, entry.start):
                self.outdated.add(entry.path)
                yield entry, None  # features that came with it are of what it was
            else:
                self.kept.add(known.id)
                self.changes.unchanged += 1
                there = (known.caption_mtime, known.label, os.fsdecode(known.below))
                if there != (entry.caption_mtime, entry.label, entry.below):
                    self.items.put(with_caption(entry), known.number)

    def _is_known(self, digest: bytes) -> bool:
        return self.items.number_of(digest) is not None

    def _skip(self, path: str, error: SampleError, tracker: SkipTracker) -> None:
        self.changes.skipped += 1
        name, reason = escaped(path), str(error)
        for prefix in ("<bytes>: ", f"{name}: "):  # a message names its source, which may be bytes
            reason = reason.removeprefix(prefix)
        if self.changes.skipped <= MAX_NAMED:
            log.warning("skipped: %s: %s", name, reason)
        try:
            tracker.add([Bad.of(path, error)])
        except DataError:
            self._commit()
            raise

    def _embed(self, batch: Sequence[Found]) -> None:
        """Features of those that have none; of the same content once."""
        new: dict[bytes, np.ndarray] = {}
        for one in batch:
            if one.pixels is not None and one.digest not in self.digests:
                new[one.digest] = one.pixels
        features = dict(zip(new, self._features(list(new.values())), strict=True))
        for one in batch:
            vector = features.get(one.digest) if one.features is None else one.features
            self.pending.append((one.entry, one.digest, vector))
            self.digests.add(one.digest)
        is_late = time.monotonic() - self.committed > MAX_SECONDS
        if len(self.pending) >= MAX_PENDING or is_late:
            self._commit()

    def _features(self, pixels: list[np.ndarray]) -> np.ndarray:
        if not pixels:
            return np.empty((0, self.vectors.width), np.float32)
        return self.clip.embed_pixels(torch.from_numpy(np.stack(pixels))).numpy()

    def _commit(self) -> None:
        """Keep what is pending: vectors on the disk first, then the rows that name them."""
        new: dict[bytes, np.ndarray] = {}
        for _, digest, vector in self.pending:
            if vector is not None and not self._is_known(digest):
                new.setdefault(digest, vector)
        rows = dict(zip(new, map(self._free_row, range(len(new))), strict=True))
        values = np.array(list(new.values()), np.float16)
        if not np.isfinite(values).all():
            raise DataError("the model gives features that are no numbers")
        self.vectors.write(list(rows.values()), values)
        with self.items.transaction():
            numbers = {digest: self.items.add_picture(row, digest) for digest, row in rows.items()}
            for entry, digest, _ in self.pending:
                number = numbers.get(digest) or self.items.number_of(digest)
                assert number is not None
                is_outdated = entry.path in self.outdated
                self.changes.changed += is_outdated
                self.changes.added += not is_outdated
                self.kept.add(self.items.put(entry, number))
        self.pending, self.digests, self.committed = [], set(), time.monotonic()

    def _free_row(self, _: int) -> int:
        row = next(self.free, None)
        if row is None:
            row, self.end = self.end, self.end + 1
        return row
