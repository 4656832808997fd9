"""An index of images: build it, keep it up to date, search it with texts or images.

    OUT/items.sqlite        the files, and the model of the index
    OUT/features.f16        their features

    texts, images, vectors -> queries (Q, E) -> rows and scores -> hits

Shapes: E embedding, Q queries, k results.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, astuple, dataclass
from pathlib import Path
from typing import Any, Unpack

import numpy as np
import torch
from PIL import Image

from leanclip.errors import ConfigError, DataError
from leanclip.inference.inputs import ImageInput
from leanclip.inference.load import load
from leanclip.inference.model import InferenceModel
from leanclip.io.files import try_lock
from leanclip.report.text import count
from leanclip.search.filters import Filters
from leanclip.search.items import FILE, Item, Items
from leanclip.search.sources import Source, read_bytes
from leanclip.search.update import Changes, Update
from leanclip.search.vectors import Vectors
from leanclip.weights import fingerprint

Query = str | np.ndarray | torch.Tensor | Path | Image.Image | bytes


@dataclass(frozen=True)
class Hit(Item):
    """An image that was found."""

    score: float  # cosine similarity; for several texts or images, see `Index.query`


class Index:
    """Images and their features in a folder; threads may share it for searching.

    Use `Index.build` or `Index.open`.

    Attributes:
        changes: the result of the last update.
    """

    def __init__(self, path: Path, items: Items) -> None:
        self.path, self.items = path, items
        self.clip: InferenceModel | None = None
        self.model: dict[str, Any] = items.metadata("model")
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
        batch_size: int = 64,
        workers: int | None = None,
        max_bad_fraction: float = 0.1,
    ) -> "Index":
        """Build an index, or continue an unfinished build.

        Args:
            sources: folders of images, .tar shards, or outputs of `leanclip embed`.
            model: a loaded model, or anything that `leanclip.load` accepts.
            out: the folder to write.
            root: for outputs of `leanclip embed`, the folder that it embedded.
            source: where a loaded model comes from, stored for `leanclip search find`.
            batch_size: see `update`, as for the other arguments.
            workers: likewise.
            max_bad_fraction: likewise.

        Raises:
            ConfigError: `out` is an index of another model, or contains other files.
            DataError: a source is missing or empty, or too many images are unreadable.
        """
        given = [sources] if isinstance(sources, str | Path) else sources
        if not given:
            raise ConfigError("search: give a folder of images")
        chosen = [Source.of(one, root) for one in given]
        clip = model if isinstance(model, InferenceModel) else load(model)
        identity = _identity(clip)
        _check_embeddings(chosen, identity)
        path = Path(out)
        if not (path / FILE).exists() and path.is_dir() and any(path.iterdir()):
            raise ConfigError(f"{path}: contains other files; choose another --out")
        path.mkdir(parents=True, exist_ok=True)
        items = Items(path, create=True)
        if items.metadata("model") is None:
            source = source or (None if isinstance(model, InferenceModel) else model)
            if source is not None and Path(source).exists():
                source = Path(source).absolute()
            items.set_metadata("model", identity | {"source": source and str(source)})
        index = cls(path, items)
        index.use(clip)
        index.update(
            chosen, batch_size=batch_size, workers=workers, max_bad_fraction=max_bad_fraction
        )
        return index

    @classmethod
    def open(cls, path: str | Path, model: InferenceModel | str | Path | None = None) -> "Index":
        """Open an index; without a model only vectors can be searched for.

        Raises:
            ConfigError: there is no index, or the model is not the one that built it.
        """
        index = cls(Path(path), Items(Path(path)))
        if model is not None:
            index.use(model if isinstance(model, InferenceModel) else load(model))
        return index

    def use(self, clip: InferenceModel) -> None:
        """Set the model for queries and updates.

        Raises:
            ConfigError: it is not the model that built the index.
        """
        identity = _identity(clip)
        differing = [name for name in identity if self.model[name] != identity[name]]
        if differing:
            source = f" ({self.model['source']})" if self.model["source"] else ""
            raise ConfigError(
                f"{self.path}: built with another model{source}: different "
                f"{', '.join(differing)}; use that model, or build another index"
            )
        self.clip = clip

    def __len__(self) -> int:
        return self.items.count()

    def close(self) -> None:
        """Close the database."""
        self.items.close()

    def update(
        self,
        sources: Sequence[Source | str | Path] | None = None,
        *,
        batch_size: int = 64,
        workers: int | None = None,
        max_bad_fraction: float = 0.1,
    ) -> Changes:
        """Add new files, drop files that are gone, and embed changed ones again.

        A file is unchanged if its size and modification time are. A file that was moved, or whose
        content is in the index already, is not embedded again.

        Args:
            sources: the new sources of the index; None: as before.
            batch_size: maximum images per forward pass.
            workers: threads that read and decode; None: one per CPU core, at most eight.
            max_bad_fraction: the fraction of images that may be unreadable; they are skipped.

        Raises:
            ConfigError: another process updates the index, or it was opened without its model.
            DataError: a source is missing or empty, or too many images are unreadable.
        """
        clip = self._clip()
        with try_lock(self.path / "lock") as is_acquired:
            if not is_acquired:
                raise ConfigError(f"{self.path}: another process is building or updating it")
            if sources is not None:
                chosen = [one if isinstance(one, Source) else Source.of(one) for one in sources]
                _check_embeddings(chosen, self.model)
                self.items.set_metadata("sources", [astuple(source) for source in chosen])
            chosen = [Source(*pair) for pair in self.items.metadata("sources") or ()]
            update = Update(self.items, self.vectors, clip)
            self.changes = update.run(chosen, batch_size, workers, max_bad_fraction)
            return self.changes

    def search(
        self,
        query: Query,
        *,
        k: int = 10,
        minimum: float | None = None,
        **filters: Unpack[Filters],
    ) -> list[Hit]:
        """The images nearest to a text (str), an image, or a vector (E,).

        Args:
            query: a text, an image (a path as `Path`, bytes, a PIL image), or a vector.
            k: see `search_many`, as for the other arguments.
            minimum: likewise.
            filters: likewise.

        Raises:
            ConfigError: the query is a text or an image, and the index has no model.
            DataError: the query is neither a text, an image nor a vector of size E.
        """
        if isinstance(query, str):
            vector = self.query(texts=[query])
        elif isinstance(query, np.ndarray | torch.Tensor) and query.ndim == 1:
            vector = np.asarray(query)
        else:
            vector = self.query(images=[query])  # pyright: ignore[reportArgumentType]
        return self.search_many(vector[None], k=k, minimum=minimum, **filters)[0]

    def search_many(
        self,
        queries: np.ndarray | torch.Tensor | Sequence[np.ndarray],
        *,
        k: int = 10,
        minimum: float | None = None,
        **filters: Unpack[Filters],
    ) -> list[list[Hit]]:
        """The nearest images to each of several vectors (Q, E), in one pass over the index.

        Args:
            queries: vectors, usually of unit length.
            k: maximum results per query.
            minimum: minimum score.
            filters: `label` (one or several), `folder`, `size` in bytes and `date`: ranges as
                (from, to), where `to` is excluded and None is no limit.

        Raises:
            DataError: the queries have the wrong shape, or values that are not finite.
            ConfigError: k is less than 1.
        """
        vectors = np.asarray(queries, dtype=np.float32)
        width = self.model["embed_dim"]
        if vectors.ndim != 2 or vectors.shape[1] != width:
            raise DataError(f"query: found shape {vectors.shape}; this index needs (Q, {width})")
        if k < 1:
            raise ConfigError(f"k: should be 1 or more, found {k}")
        if not np.isfinite(vectors).all():
            raise DataError("query: values are not finite")
        results = []
        for numbers, scores in self.vectors.best(vectors, k, self.items.mask(**filters)):
            hits: list[Hit] = []
            for number, score in zip(numbers.tolist(), scores.tolist(), strict=True):
                item = self.items.item(number, **filters)  # None if it was dropped just now
                if item is not None and (minimum is None or score >= minimum):
                    hits.append(Hit(**vars(item), score=score))
            results.append(hits)
        return results

    def query(
        self,
        texts: Sequence[str] = (),
        images: Sequence[ImageInput] = (),
        without: Sequence[str] = (),
        weights: Sequence[float] | None = None,
    ) -> np.ndarray:
        """One vector (E,) for several texts and images, and negative texts.

        The score of an image is the weighted mean of its cosines with `texts` and `images`, minus
        the mean cosine with `without`; for a single text or image it is the cosine.

        Args:
            texts: texts to search for.
            images: images to search for.
            without: negative texts.
            weights: of the texts, then of the images; None: all equal.

        Raises:
            ConfigError: there are no texts and images, or weights are not positive or their number
                is wrong.
            DataError: a text exceeds the context length, or an image cannot be read.
        """
        clip = self._clip()
        if not texts and not len(images):
            raise ConfigError("search: give a text, or an image with --image")
        parts = [clip.embed_texts(list(texts)), clip.embed_images(list(images))]
        wanted = np.concatenate(parts).astype(np.float64)
        factors = np.ones(len(wanted)) if weights is None else np.asarray(weights, float)
        if factors.shape != (len(wanted),) or not (factors > 0).all():
            needed = count(len(wanted), "positive number")
            raise ConfigError(f"weights: should be {needed}, found {weights}")
        vector = factors @ wanted / factors.sum()
        if without:
            vector -= clip.embed_texts(list(without)).mean(axis=0)
        return vector.astype(np.float32)

    def item(self, number: int) -> Item:
        """An image by its number.

        Raises:
            DataError: there is no image with this number.
        """
        found = self.items.item(number)
        if found is None:
            raise DataError(f"{self.path}: no image has the number {number}")
        return found

    def read(self, number: int) -> bytes:
        """The content of the file of an image.

        Raises:
            DataError: there is no image with this number, or its file is gone.
        """
        item = self.item(number)
        return read_bytes(item.path, item.shard, item.start, item.size)

    def vector(self, number: int) -> np.ndarray:
        """The features (E,) of an image, float32, to search for similar ones.

        Raises:
            DataError: there is no image with this number.
        """
        return self.vectors.read(np.array([self.item(number).number]))[0].astype(np.float32)

    def labels(self) -> dict[str, int]:
        """Labels, and the number of files with each."""
        return self.items.labels()

    def _clip(self) -> InferenceModel:
        if self.clip is None:
            raise ConfigError(f"{self.path}: opened without a model; texts and images need one")
        return self.clip


def _identity(clip: InferenceModel) -> dict[str, Any]:
    """What determines a model's features, as hashes, and their width."""
    return {
        "weights": fingerprint(clip.model.state_dict()),
        "preprocessing": _hash(asdict(clip.preprocess)),
        "tokeniser": clip.model.tokenizer.fingerprint(),
        "embed_dim": clip.model.config.embed_dim,
    }


def _hash(value: object) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


def _check_embeddings(sources: Sequence[Source], model: dict[str, Any]) -> None:
    for source in sources:
        if source.weights() not in (None, model["weights"]):
            raise ConfigError(
                f"{source.path}: these embeddings were computed with other weights; use the model "
                f"of leanclip embed"
            )
