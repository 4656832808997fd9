"""Bring an index up to date with its sources.

    sources -> entries -> new and changed ones -> threads read and decode -> features
            -> vectors (a float16 file), then items (SQLite), committed together

A vector is on the disk before the items that refer to it are committed: an update that is killed
leaves a valid index, and the next one continues.

Shapes: E embedding.
"""

import itertools
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from leanclip.data.skipped import Bad, SkipTracker
from leanclip.errors import DataError, SampleError, escaped
from leanclip.inference.model import InferenceModel
from leanclip.io.progress import ProgressBar
from leanclip.io.threads import map_in_threads
from leanclip.search.items import Entry, Items
from leanclip.search.sources import Content, Source, read, with_caption
from leanclip.search.vectors import Vectors

log = logging.getLogger("leanclip")

COMMIT_EVERY = 1024  # images


@dataclass
class Changes:
    """The result of an update, in files."""

    added: int = 0
    changed: int = 0
    dropped: int = 0
    unchanged: int = 0
    skipped: int = 0  # unreadable
    files: int = 0
    pictures: int = 0  # with different content


class Update:
    """One pass over the sources of an index; the arguments are those of `Index.update`."""

    def __init__(self, items: Items, vectors: Vectors, clip: InferenceModel) -> None:
        self.items, self.vectors, self.clip = items, vectors, clip
        self.unseen = items.ids()  # indexed files that the sources have not listed yet
        self.changes = Changes()

    def run(
        self,
        sources: Sequence[Source],
        batch_size: int,
        workers: int | None,
        max_bad_fraction: float,
    ) -> Changes:
        """Update the index.

        Raises:
            DataError: a source is gone or has no images, or too many images are unreadable.
        """
        listings = [source.entries() for source in sources]
        total = sum(count for count, _ in listings)
        tracker = SkipTracker(total, max_bad_fraction, option="--max-bad-fraction")
        entries = (one for _, entries in listings for one in entries)
        contents = map_in_threads(self._read, self._new(entries), workers, batch_size)
        pending: list[Content] = []
        with ProgressBar("indexing", max(total, 1)) as bar:
            while batch := list(itertools.islice(contents, batch_size)):
                bad = [one for one in batch if isinstance(one, Bad)]
                for one in bad:
                    log.warning("skipped: %s", one.reason)
                tracker.add(bad)
                self.changes.skipped += len(bad)
                pending += self._embed([one for one in batch if isinstance(one, Content)])
                if len(pending) >= COMMIT_EVERY:
                    self._commit(pending)
                    pending = []
                done = self.changes.added + self.changes.changed + self.changes.skipped
                bar.update(done + len(pending) + self.changes.unchanged)
            self._commit(pending)
        self.items.drop(self.unseen)
        self.changes.dropped = len(self.unseen)
        self.changes.files, self.changes.pictures = self.items.count_files(), self.items.count()
        return self.changes

    def _new(
        self, entries: Iterator[tuple[Entry, np.ndarray | None]]
    ) -> Iterator[tuple[Entry, np.ndarray | None]]:
        """The entries that are not indexed; the captions and labels of the others are updated."""
        for entry, features in entries:
            known = self.items.find(entry.path)
            if known is None:
                yield entry, features
            elif (known.size, known.mtime, known.start) != (entry.size, entry.mtime, entry.start):
                yield entry, None  # the source's features are those of the former content
            else:
                self.unseen.discard(known.id)
                self.changes.unchanged += 1
                if (known.caption_mtime, known.label) != (entry.caption_mtime, entry.label):
                    with self.items.transaction():
                        self.items.put(with_caption(entry), known.number, known.hash)

    def _read(self, _: int, one: tuple[Entry, np.ndarray | None]) -> Content | Bad:
        try:
            return read(*one, self.clip.preprocess, self.items.number_of)
        except SampleError as error:
            return Bad.of(escaped(one[0].path), error)

    def _embed(self, batch: Sequence[Content]) -> list[Content]:
        """The batch with the features of its pixels."""
        pixels = [one.pixels for one in batch if one.pixels is not None]
        if not pixels:
            return list(batch)
        features = iter(self.clip.embed_pixels(self.clip.preprocess.stack(pixels)).numpy())
        return [
            one if one.pixels is None else one._replace(features=next(features), pixels=None)
            for one in batch
        ]

    def _commit(self, contents: Sequence[Content]) -> None:
        """Write the new vectors to the disk, then the items that refer to them."""
        numbers: dict[bytes, int | None] = {}
        for one in contents:
            is_known = one.number is not None
            numbers[one.digest] = one.number if is_known else self.items.number_of(one.digest)
        new = {one.digest: one.features for one in contents if numbers[one.digest] is None}
        if new:
            values = np.array(list(new.values()), np.float16)
            if not np.isfinite(values).all():
                raise DataError("the model computes features that are not finite")
            numbers |= zip(new, itertools.count(self.vectors.append(values)), strict=False)
        with self.items.transaction():
            for one in contents:
                number = numbers[one.digest]
                assert number is not None
                id = self.items.put(one.entry, number, one.digest)
                if id in self.unseen:
                    self.unseen.remove(id)
                    self.changes.changed += 1
                else:
                    self.changes.added += 1
