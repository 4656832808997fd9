"""An index of pictures: build it, keep it up to date, find pictures by words or pictures.

    sources -> entries -> what is new or changed -> threads read and decode -> features
            -> vectors (fp16 shards), then items (SQLite), committed together every so often

A picture is in the index as soon as its row is committed, and its vector is on the disk before
that: killed at any moment, it holds whole pictures, and the same command goes on.

Shapes: N rows, E embedding, Q queries.
"""

import hashlib
import json
import logging
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, astuple, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from leanclip.errors import ConfigError, DataError, SampleError
from leanclip.fetch import held
from leanclip.inference import Clip, load
from leanclip.inputs import ImageInput, in_threads
from leanclip.search.filters import conditions
from leanclip.search.items import FILE, Entry, Item, Items
from leanclip.search.sources import Found, Source, read, read_bytes, with_caption
from leanclip.search.vectors import SHARD_ROWS, Vectors
from leanclip.tokenizer import merges
from leanclip.tracking import ProgressBar
from leanclip.weights import fingerprint

log = logging.getLogger("leanclip")

Query = str | np.ndarray | torch.Tensor | Path | Image.Image | bytes
Range = tuple[Any, Any]  # the least that counts, and the first that is too much; None: no limit

MOST_PENDING = 1024  # pictures, or
MOST_SECONDS = 5.0  # between two commits
MOST_NAMED = 20  # of what cannot be read
KNOWN_PARTS = {
    "weights": "the weights",
    "preprocess": "the preprocessing",
    "tokenizer": "the tokeniser",
}


@dataclass(frozen=True)
class Hit(Item):
    """A picture that was found."""

    score: float  # cosine similarity; for several, see `Index.query`


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


class Index:
    """Pictures and their features in a folder; any thread may search.

    Use `Index.build` or `Index.open`.

    Args:
        path: the folder.
        items: its database.
        clip: the model, where words and pictures shall be searched for.
    """

    def __init__(self, path: Path, items: Items, clip: Clip | None = None) -> None:
        self.path, self.items, self.clip = path, items, clip
        self.model: dict[str, Any] = items.fact("model")
        self.vectors = Vectors(path, self.model["embed_dim"], self.model["shard_rows"])
        if clip is not None:
            check_model(self.model, identity(clip), path)

    @classmethod
    def build(
        cls,
        sources: str | Path | Sequence[str | Path],
        model: Clip | str | Path,
        out: str | Path,
        *,
        root: str | Path | None = None,
        shard_rows: int = SHARD_ROWS,
        **settings: Any,
    ) -> "Index":
        """Make an index, or go on with one that was begun.

        Args:
            sources: folders, .tar shards, or folders of `leanclip embed`.
            model: a loaded model, or what `leanclip.load` takes.
            out: the folder to write.
            root: where the paths begin that `leanclip embed` wrote; its FOLDER.
            shard_rows: vectors of a file.
            settings: see `update`.

        Raises:
            ConfigError: `out` is of another model, or holds something else.
            DataError: a source is missing or empty, or too much of it is unreadable.
        """
        given = [sources] if isinstance(sources, str | Path) else sources
        wanted = [Source.of(source, root) for source in given]
        if not wanted:
            raise ConfigError("search: give a folder of images")
        path, clip = Path(out), model if isinstance(model, Clip) else load(model)
        facts = identity(clip)
        for source in wanted:
            _check_embeddings(source, facts)
        if not (path / FILE).exists() and path.is_dir() and any(path.iterdir()):
            raise ConfigError(f"{path}: holds something else; choose another --out")
        path.mkdir(parents=True, exist_ok=True)
        items = Items(path, create=True)
        with items.transaction():
            if items.fact("model") is None:
                name = None if isinstance(model, Clip) else _name(model)
                items.note("model", facts | {"shard_rows": shard_rows, "source": name})
        index = cls(path, items)
        check_model(index.model, facts, path)
        index.clip = clip
        index.update(wanted, **settings)
        return index

    @classmethod
    def open(cls, path: str | Path, model: Clip | str | Path | None = None) -> "Index":
        """An index that is there; with a model, words and pictures can be searched for.

        Raises:
            ConfigError: there is none, or it is of another model.
        """
        items = Items(Path(path))
        if items.fact("model") is None:
            raise ConfigError(f"{path}: was not begun in earnest; build it again")
        clip = model if isinstance(model, Clip) or model is None else load(model)
        return cls(Path(path), items, clip)

    def __len__(self) -> int:
        return self.items.count()

    def close(self) -> None:
        """Close its database."""
        self.items.close()

    def update(
        self,
        sources: Sequence[Source | str | Path] | None = None,
        *,
        batch_size: int = 64,
        workers: int | None = None,
        max_bad_share: float = 0.1,
    ) -> Changes:
        """Add what is new, drop what is gone, embed again what has changed.

        A file counts as unchanged while its size and time are. A file that was moved, or that
        has the content of another, is not embedded again.

        Args:
            sources: what the index shall be of from now on; None: as before.
            batch_size: images of a forward pass.
            workers: threads that read and decode; None: one per CPU core, eight at most.
            max_bad_share: the share of images that may be unreadable; they are left out.

        Raises:
            ConfigError: another process is at it, or the index was opened without its model.
            DataError: a source is missing or empty, or too much of it is unreadable.
        """
        clip = self._clip()
        with held(self.path / "lock") as is_ours:
            if not is_ours:
                raise ConfigError(f"{self.path}: another process is building or updating it")
            if sources is not None:
                chosen = [s if isinstance(s, Source) else Source.of(s) for s in sources]
                for source in chosen:
                    _check_embeddings(source, self.model)
                self.items.note("sources", [astuple(source) for source in chosen])
            there = [Source(*pair) for pair in self.items.fact("sources") or ()]
            return _Update(self, clip, batch_size, workers, max_bad_share).run(there)

    def search(self, query: Query, **settings: Any) -> list[Hit]:
        """The pictures that are nearest to a text (str), an image, or a vector (E,).

        Args:
            query: a text, an image (a path as `Path`, bytes, a PIL image), or a vector.
            settings: see `search_many`.

        Raises:
            ConfigError: for words and images: the index was opened without a model.
            DataError: the query is no text, image or vector of E.
        """
        if isinstance(query, str):
            vector = self.query(texts=[query])
        elif isinstance(query, np.ndarray | torch.Tensor) and query.ndim == 1:
            vector = np.asarray(query)
        else:
            vector = self.query(images=[query])  # pyright: ignore[reportArgumentType]
        return self.search_many(vector[None], **settings)[0]

    def search_many(
        self,
        queries: np.ndarray | torch.Tensor | Sequence[np.ndarray],
        *,
        k: int = 10,
        minimum: float | None = None,
        label: str | Sequence[str] | None = None,
        folder: str | Path | None = None,
        size: Range | None = None,
        date: Range | None = None,
    ) -> list[list[Hit]]:
        """The nearest pictures to each of several vectors (Q, E), which cost one pass together.

        Args:
            queries: vectors, of unit length as a rule.
            k: the most that are found.
            minimum: the least score.
            label: one or several that count.
            folder: one that counts, with all below it: its path, or the end of its path below
                a source.
            size: bytes from, and bytes below.
            date: from, and before: datetimes, or seconds since 1970.

        Raises:
            DataError: they are not of the index's width.
        """
        vectors = np.asarray(queries, dtype=np.float32)
        width = self.model["embed_dim"]
        if vectors.ndim != 2 or vectors.shape[1] != width:
            raise DataError(f"query: of shape {vectors.shape}; this index wants (Q, {width})")
        if k < 1:
            raise ConfigError(f"k: should be 1 or more, found {k}")
        if not np.isfinite(vectors).all():
            raise DataError("query: holds values that are no numbers")
        allowed = self.items.used()
        condition, values = conditions(label=label, folder=folder, size=size, date=date)
        if values:
            allowed = allowed & self.items.rows_where(condition, values, len(allowed))
        found = self.vectors.best(vectors, k, allowed)
        return [list(self._hits(*one, minimum, condition, values)) for one in found]

    def query(
        self,
        texts: Sequence[str] = (),
        images: Sequence[ImageInput] = (),
        without: Sequence[str] = (),
        weights: Sequence[float] | None = None,
    ) -> np.ndarray:
        """One vector (E,) of several texts and images, and of texts that shall not fit.

        Its score is the weighted mean of the cosines, less the mean cosine with `without`; for one
        text or image alone that is the cosine.

        Args:
            texts: words.
            images: pictures.
            without: words for what is not wanted.
            weights: of texts, then of images; None: all the same.

        Raises:
            ConfigError: nothing is wanted, or weights are not as many or not above 0.
            DataError: a text is over the context, or an image cannot be read.
        """
        clip = self._clip()
        if not texts and not len(images):
            raise ConfigError("search: say what to look for: words, or --image")
        parts = [clip.embed_texts(list(texts)), clip.embed_images(list(images))]
        wanted = np.concatenate(parts).astype(np.float64)
        weights_ = np.ones(len(wanted)) if weights is None else np.asarray(weights, float)
        if weights_.shape != (len(wanted),) or not (weights_ > 0).all():
            raise ConfigError(f"weights: {len(wanted)} above 0 are wanted, found {weights}")
        vector = weights_ @ wanted / weights_.sum()
        if without:
            vector -= clip.embed_texts(list(without)).mean(axis=0)
        return vector.astype(np.float32)

    def item(self, number: int) -> Item:
        """A picture by its number.

        Raises:
            DataError: there is none of this number.
        """
        found = self.items.item(number)
        if found is None:
            raise DataError(f"{number}: is the number of no picture in {self.path}")
        return found

    def read(self, number: int) -> bytes:
        """The content of a picture's file.

        Raises:
            DataError: there is no such picture, or its file is gone.
        """
        item = self.item(number)
        return read_bytes(item.path, item.shard, item.start, item.size)

    def vector(self, number: int) -> np.ndarray:
        """A picture's features (E,), to look for those like it.

        Raises:
            DataError: there is none of this number.
        """
        row = self.items.row_of(number)
        if row is None:
            raise DataError(f"{number}: is the number of no picture in {self.path}")
        return self.vectors.read([row])[0].astype(np.float32)

    def labels(self) -> dict[str, int]:
        """Labels, and how many files have each."""
        return self.items.labels()

    def _hits(
        self,
        rows: np.ndarray,
        scores: np.ndarray,
        minimum: float | None,
        condition: str,
        values: Sequence[object],
    ) -> Iterator[Hit]:
        for row, score in zip(rows.tolist(), scores.tolist(), strict=True):
            if minimum is not None and score < minimum:
                return
            number = self.items.number_at(row)  # None: it was dropped a moment ago
            item = None if number is None else self.items.item(number, condition, values)
            if item is not None:
                yield Hit(*(getattr(item, field.name) for field in fields(Item)), score)

    def _clip(self) -> Clip:
        if self.clip is None:
            raise ConfigError(f"{self.path}: was opened without a model; give it one")
        return self.clip


class _Update:
    """One run through the sources of an index."""

    def __init__(
        self, index: Index, clip: Clip, batch_size: int, workers: int | None, max_bad_share: float
    ) -> None:
        self.index, self.items, self.clip = index, index.items, clip
        self.batch_size, self.workers, self.max_bad_share = batch_size, workers, max_bad_share
        used = self.items.used()
        self.free = iter(np.flatnonzero(~used).tolist())  # of pictures dropped before this run
        self.end = len(used)
        self.kept: set[int] = set()  # ids of items
        self.pending: list[tuple[Entry, bytes, np.ndarray | None]] = []
        self.digests: set[bytes] = set()  # of those
        self.committed = time.monotonic()
        self.changes = Changes()

    def run(self, sources: Sequence[Source]) -> Changes:
        """Bring the index to what is there."""
        listings = [source.entries() for source in sources]
        total = sum(count for count, _ in listings)
        resolution = self.clip.preprocess.resolution

        def work(_: int, one: tuple[Entry, np.ndarray | None]) -> Found | tuple[str, SampleError]:
            try:
                return read(*one, resolution, self._is_known)
            except SampleError as error:
                return one[0].path, error

        new = (
            (entry, features if self.items.known(entry.path) is None else None)  # else outdated
            for _, entries in listings
            for entry, features in entries
            if not self._is_unchanged(entry)
        )
        batch: list[Found] = []
        with ProgressBar("indexing", max(total, 1)) as bar:
            for done, one in enumerate(in_threads(work, new, self.workers, self.batch_size), 1):
                if isinstance(one, Found):
                    batch.append(one)
                else:
                    self._skip(*one, total)
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

    def _is_unchanged(self, entry: Entry) -> bool:
        """Whether a file is as it was; a new caption or label is noted."""
        known = self.items.known(entry.path)
        if known is None or known[2:5] != (entry.size, entry.mtime, entry.start):
            return False
        self.kept.add(known.id)
        self.changes.unchanged += 1
        there = (known.caption_mtime, known.label, os.fsdecode(known.below))
        if there != (entry.caption_mtime, entry.label, entry.below):
            self.items.put(with_caption(entry), known.number)
        return True

    def _is_known(self, digest: bytes) -> bool:
        return self.items.number_of(digest) is not None

    def _skip(self, path: str, error: SampleError, total: int) -> None:
        self.changes.skipped += 1
        if self.changes.skipped <= MOST_NAMED:
            log.warning("skipped: %s: %s", path, error)
        if self.changes.skipped > self.max_bad_share * total:
            self._commit()
            raise DataError(
                f"{self.changes.skipped} of {total} images are unreadable, allowed are "
                f"{self.max_bad_share:.1%} (--max-bad-share); the last: {path}: {error}"
            )

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
        is_late = time.monotonic() - self.committed > MOST_SECONDS
        if len(self.pending) >= MOST_PENDING or is_late:
            self._commit()

    def _features(self, pixels: list[np.ndarray]) -> np.ndarray:
        if not pixels:
            return np.empty((0, self.index.model["embed_dim"]), np.float32)
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
        self.index.vectors.write(list(rows.values()), values)
        with self.items.transaction():
            numbers = {digest: self.items.add_picture(row, digest) for digest, row in rows.items()}
            for entry, digest, _ in self.pending:
                number = numbers.get(digest) or self.items.number_of(digest)
                assert number is not None
                known = self.items.known(entry.path)
                self.changes.added += known is None
                self.changes.changed += known is not None
                self.kept.add(self.items.put(entry, number))
        self.pending, self.digests, self.committed = [], set(), time.monotonic()

    def _free_row(self, _: int) -> int:
        row = next(self.free, None)
        if row is None:
            row, self.end = self.end, self.end + 1
        return row


def identity(clip: Clip) -> dict[str, Any]:
    """What decides a model's features: hashes of weights, preprocessing and tokeniser."""
    words = [merges(), clip.model.context_length]
    return {
        "weights": fingerprint(clip.model.state_dict()),
        "preprocess": _hash(asdict(clip.preprocess)),
        "tokenizer": _hash(words),
        "embed_dim": clip.model.config.embed_dim,
    }


def check_model(there: Mapping[str, Any], here: Mapping[str, Any], path: Path) -> None:
    """See that a model is the one that an index is of.

    Raises:
        ConfigError: it is another.
    """
    differing = [words for name, words in KNOWN_PARTS.items() if there[name] != here[name]]
    if differing:
        source = f" ({there['source']})" if there.get("source") else ""
        raise ConfigError(
            f"{path}: is of another model{source}: {', '.join(differing)} differ; give that one, "
            f"or build another index"
        )


def _check_embeddings(source: Source, model: Mapping[str, Any]) -> None:
    weights = source.weights()
    if weights is not None and weights != model["weights"]:
        raise ConfigError(
            f"{source.path}: its embeddings are of other weights than the model's; give the model "
            f"that leanclip embed was given"
        )


def _hash(value: object) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


def _name(model: str | Path) -> str:
    """What a model is called from any folder."""
    return str(Path(model).absolute()) if Path(model).exists() else str(model)
