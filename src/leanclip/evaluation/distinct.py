"""The distinct images of a data set, ordered and sampled by their content.

    rows -> digests of their image files -> rows with the same digest are one image -> `limit`

Tables often have one row per caption, and folders copies of a file: rows whose image files have
the same bytes are one image with the captions of all of them. Images are ordered by digest and
captions by text, so that metrics do not depend on the order of the rows or the format of the data.
The first images in that order are a random sample, the same for every model and seed.

Shapes: N rows.
"""

import io
from hashlib import blake2b
from pathlib import Path
from weakref import WeakKeyDictionary

import numpy as np
import torch

from leanclip.data import Dataset, Sample
from leanclip.distributed.collectives import all_gather_object, gather_rows, rank_and_world_size
from leanclip.errors import SampleError, is_shortage
from leanclip.io.progress import ProgressBar
from leanclip.io.threads import map_in_threads
from leanclip.preprocess.decoding import open_regular_file

_AHEAD = 64  # images read ahead
_CHUNK = 1 << 20  # bytes of a file read at a time
_DIGESTS: WeakKeyDictionary[Dataset, np.ndarray] = WeakKeyDictionary()


class DistinctImages(Dataset):
    """The chosen images of a data set; captioned ones have the captions of all their rows.

    Attributes:
        first_rows: the first row of each image.
        available: the number of distinct images in the data set.
        names: the number of files, or rows with image bytes, that the chosen images come from.
    """

    def __init__(
        self, dataset: Dataset, rows: np.ndarray, starts: np.ndarray, *, available: int, names: int
    ) -> None:
        self.dataset, self.available, self.names = dataset, available, names
        self.classes, self.templates, self.about = dataset.classes, dataset.templates, dataset.about
        self.first_rows = rows[starts]
        self._rows, self._ends = rows, np.append(starts, len(rows))

    def __len__(self) -> int:
        return len(self.first_rows)

    def __getitem__(self, index: int) -> Sample:
        first, *others = (self.dataset[row] for row in self._rows_of(index))
        if self.classes:
            return first
        captions = (caption.strip() for one in (first, *others) for caption in one.captions)
        return Sample(first.id, first.image, sorted(filter(None, captions)) or [""])

    def name(self, index: int) -> str:
        """The name of the first row."""
        return self.dataset.name(int(self.first_rows[index]))

    def names_of(self, index: int) -> list[str]:
        """The ids of an image's rows."""
        return list(dict.fromkeys(_image(self.dataset, row)[0] for row in self._rows_of(index)))

    def _rows_of(self, index: int) -> list[int]:
        return self._rows[self._ends[index] : self._ends[index + 1]].tolist()


def distinct_images(
    dataset: Dataset, limit: int | None = None, *, workers: int | None = None
) -> DistinctImages:
    """The images of a data set, or a sample of `limit` of them; every rank calls this.

    In class data every row of a chosen image remains a sample.

    Args:
        dataset: one that is read by index.
        limit: how many images; None: all.
        workers: threads that read files; None: one per CPU core, at most eight.
    """
    digests, names = image_digests(dataset, workers).T
    order = digests.argsort(kind="stable")
    starts = _starts(digests[order])
    available = len(starts)
    if limit is not None and limit < available:
        order, starts = order[: starts[limit]], starts[:limit]
    firsts = np.repeat(order[starts], np.diff([*starts, len(order)]))
    if not all_gather_object(dataset.has_random_access)[0]:
        by_row = np.lexsort((order, firsts))
        order, firsts = order[by_row], firsts[by_row]
    starts = np.arange(len(order)) if dataset.classes else _starts(firsts)
    different = len(np.unique(names[order]))
    return DistinctImages(dataset, order, starts, available=available, names=different)


def image_digests(dataset: Dataset, workers: int | None = None) -> np.ndarray:
    """Digests of each row's image bytes and of its sample's id: (N, 2) int64.

    An unreadable image has a digest of its id in both. Ranks share the work, which is done once
    per data set.
    """
    if (known := _DIGESTS.get(dataset)) is not None:
        return known
    rank, world_size = rank_and_world_size()
    begin, end = (len(dataset) * n // world_size for n in (rank, rank + 1))
    found = np.empty((end - begin, 2), np.int64)
    sources = (_image(dataset, row) for row in range(begin, end))
    with ProgressBar("comparing images", len(found), is_silent=rank > 0) as bar:
        for i, both in enumerate(map_in_threads(_digests, sources, workers, _AHEAD)):
            found[i] = both
            bar.update(i + 1)
    _DIGESTS[dataset] = gather_rows(torch.from_numpy(found))[0].numpy()
    return _DIGESTS[dataset]


def _starts(values: np.ndarray) -> np.ndarray:
    """Where runs of equal values begin."""
    return np.flatnonzero(np.append(True, values[1:] != values[:-1])[: len(values)])


def _image(dataset: Dataset, row: int) -> tuple[str, Path | bytes]:
    """A sample's id, and its image's path or bytes; empty bytes if it cannot be used."""
    try:
        sample = dataset[row]
    except SampleError:
        return dataset.name(row), b""
    return sample.id, sample.image


def _digests(_: int, named: tuple[str, Path | bytes]) -> tuple[int, int]:
    name, image = named
    found, is_empty = blake2b(digest_size=8), True
    by_name = blake2b(ascii(name).encode(), digest_size=8, person=b"name")
    try:
        with io.BytesIO(image) if isinstance(image, bytes) else open_regular_file(image) as file:
            while chunk := file.read(_CHUNK):
                found.update(chunk)
                is_empty = False
    except OSError as error:
        if is_shortage(error):
            raise
        is_empty = True
    first, second = (
        int.from_bytes(one.digest(), signed=True)
        for one in (by_name if is_empty else found, by_name)
    )
    return first, second
