"""An index of pictures: build it, keep it up to date, find pictures by words or pictures.

    OUT/items.sqlite        pictures and their files; what the index is of
    OUT/features.f16        their features

    words, pictures, vectors -> queries (Q, E) -> rows and scores -> hits

Shapes: N rows, E embedding, Q queries, k best.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from leanclip.errors import ConfigError, DataError
from leanclip.inference.inputs import ImageInput
from leanclip.inference.load import load
from leanclip.inference.model import InferenceModel
from leanclip.io.files import try_lock
from leanclip.search.filters import Range, conditions
from leanclip.search.identity import check_model, identity
from leanclip.search.items import FILE, Item, Items
from leanclip.search.sources import Source, read_bytes
from leanclip.search.update import Changes, Update
from leanclip.search.vectors import Vectors

Query = str | np.ndarray | torch.Tensor | Path | Image.Image | bytes


@dataclass(frozen=True)
class Hit(Item):
    """A picture that was found."""

    score: float  # cosine similarity; for several, see `Index.query`


class Index:
    """Pictures and their features in a folder; any thread may search.

    Use `Index.build` or `Index.open`.

    Args:
        path: the folder.
        items: its database.

    Attributes:
        changes: what the last update came to.
    """

    def __init__(self, path: Path, items: Items) -> None:
        self.path, self.items = path, items
        self.clip: InferenceModel | None = None
        self.model: dict[str, Any] = items.fact("model")
        self.vectors = Vectors(path, self.model["embed_dim"])
        self.changes = Changes()

    @classmethod
    def build(
        cls,
        sources: str | Path | Sequence[str | Path],
        model: InferenceModel | str | Path,
        out: str | Path,
        *,
        root: str | Path | None = None,
        source: str | Path | None = None,
        **settings: Any,
    ) -> "Index":
        """Make an index, or go on with one that was begun.

        Args:
            sources: folders, .tar shards, or folders of `leanclip embed`.
            model: a loaded model, or what `leanclip.load` takes.
            out: the folder to write.
            root: where the paths begin that `leanclip embed` wrote; its FOLDER.
            source: where a loaded model is from, to be noted.
            settings: see `update`.

        Raises:
            ConfigError: `out` is of another model, or holds something else.
            DataError: a source is missing or empty, or too much of it is unreadable.
        """
        given = [sources] if isinstance(sources, str | Path) else sources
        wanted = [Source.of(one, root) for one in given]
        if not wanted:
            raise ConfigError("search: give a folder of images")
        clip = model if isinstance(model, InferenceModel) else load(model)
        if source is None and not isinstance(model, InferenceModel):
            source = model
        path, facts = Path(out), identity(clip)
        for one in wanted:
            _check_embeddings(one, facts)
        if not (path / FILE).exists() and path.is_dir() and any(path.iterdir()):
            raise ConfigError(f"{path}: holds something else; choose another --out")
        path.mkdir(parents=True, exist_ok=True)
        items = Items(path, create=True)
        with items.transaction():
            if items.fact("model") is None:
                name = None if source is None else _name(source)
                items.note("model", facts | {"source": name})
        index = cls(path, items)
        index.use(clip)
        index.update(wanted, **settings)
        return index

    @classmethod
    def open(cls, path: str | Path, model: InferenceModel | str | Path | None = None) -> "Index":
        """An index that is there; with a model, words and pictures can be searched for.

        Raises:
            ConfigError: there is none, or it is of another model.
        """
        items = Items(Path(path))
        if items.fact("model") is None:
            raise ConfigError(f"{path}: was not begun in earnest; build it again")
        index = cls(Path(path), items)
        if model is not None:
            index.use(model if isinstance(model, InferenceModel) else load(model))
        return index

    def use(self, clip: InferenceModel) -> None:
        """Give it its model, for searching words and pictures, and for updates.

        Raises:
            ConfigError: the index is of another.
        """
        check_model(self.model, identity(clip), self.path)
        self.clip = clip

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
        max_bad_fraction: float = 0.1,
    ) -> Changes:
        """Add what is new, drop what is gone, embed again what has changed.

        A file counts as unchanged while its size and time are. A file that was moved, or that
        has the content of another, is not embedded again.

        Args:
            sources: what the index shall be of from now on; None: as before.
            batch_size: the most images of a forward pass.
            workers: threads that read and decode; None: one per CPU core, eight at most.
            max_bad_fraction: the share of images that may be unreadable; they are left out.

        Raises:
            ConfigError: another process is at it, or the index was opened without its model.
            DataError: a source is missing or empty, or too much of it is unreadable.
        """
        clip = self._clip()
        with try_lock(self.path / "lock") as is_acquired:
            if not is_acquired:
                raise ConfigError(f"{self.path}: another process is building or updating it")
            if sources is not None:
                chosen = [s if isinstance(s, Source) else Source.of(s) for s in sources]
                for source in chosen:
                    _check_embeddings(source, self.model)
                self.items.note("sources", [astuple(source) for source in chosen])
            there = [Source(*pair) for pair in self.items.fact("sources") or ()]
            run = Update(self.items, self.vectors, clip, batch_size, workers, max_bad_fraction)
            self.changes = run.run(there)
            return self.changes

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
            ConfigError: a setting is wrong.
        """
        vectors = np.asarray(queries, dtype=np.float32)
        width = self.model["embed_dim"]
        if vectors.ndim != 2 or vectors.shape[1] != width:
            raise DataError(f"query: of shape {vectors.shape}; this index wants (Q, {width})")
        if k < 1:
            raise ConfigError(f"k: should be 1 or more, found {k}")
        if not np.isfinite(vectors).all():
            raise DataError("query: holds values that are no numbers")
        numbers = self.items.numbers()
        condition, values = conditions(label=label, folder=folder, size=size, date=date)
        allowed = numbers > 0
        if values:
            allowed &= self.items.rows_where(condition, values, len(numbers))
        found = self.vectors.best(vectors, k, allowed)
        return [list(self._hits(*one, numbers, minimum, condition, values)) for one in found]

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
        numbers: np.ndarray,
        minimum: float | None,
        condition: str,
        values: Sequence[object],
    ) -> Iterator[Hit]:
        for row, score in zip(rows.tolist(), scores.tolist(), strict=True):
            if minimum is not None and score < minimum:
                return
            item = self.items.item(int(numbers[row]), condition, values)
            if item is not None:  # else it was dropped a moment ago
                yield Hit(**vars(item), score=score)

    def _clip(self) -> InferenceModel:
        if self.clip is None:
            raise ConfigError(f"{self.path}: was opened without a model; give it one")
        return self.clip


def _check_embeddings(source: Source, model: Mapping[str, Any]) -> None:
    weights = source.weights()
    if weights is not None and weights != model["weights"]:
        raise ConfigError(
            f"{source.path}: its embeddings are of other weights than the model's; give the model "
            f"that leanclip embed was given"
        )


def _name(model: str | Path) -> str:
    """What a model is called from any folder."""
    return str(Path(model).absolute()) if Path(model).exists() else str(model)
