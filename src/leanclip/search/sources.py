"""Where the images of an index come from, and which images are there now.

    a folder       images at any depth, captions beside them (a.jpg, a.txt), and *.tar at its top
    a .tar         WebDataset: members of one name are an image, its .txt and its .cls
    embeddings     the output of `leanclip embed`: features, and ids, which are paths in `root`

The label of an image is its first folder below the source, or below its split if the source has
folders train, val and so on; in a shard, it is the .cls.

Shapes: E embedding, R resolution.
"""

import hashlib
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from leanclip.data.dataset import ClassFile, index_labels, read_class_file, read_lines, readable
from leanclip.data.readers.image_files import list_images, no_images
from leanclip.data.readers.shard_cache import shard_index
from leanclip.data.readers.tar_index import shard_warnings
from leanclip.data.splits import splits_in
from leanclip.errors import ConfigError, DataError, SampleError, escaped
from leanclip.evaluation.feature_store import read_index
from leanclip.inference.embeddings import embeddings_index, shards_of
from leanclip.io.files import LFS_POINTER, is_lfs_file
from leanclip.preprocess.decoding import image_errors, open_regular_file
from leanclip.preprocess.images import Preprocess, evaluation_pixels
from leanclip.search.filters import absolute
from leanclip.search.items import Entry

log = logging.getLogger("leanclip")

MAX_TEXT_BYTES = 1 << 20  # of a text in a shard


@dataclass(frozen=True)
class Source:
    """A folder, a shard or a folder of embeddings, whose ids are paths in `root`."""

    path: str
    root: str | None = None

    @classmethod
    def of(cls, path: str | Path, root: str | Path | None = None) -> "Source":
        """A source by its path; relative paths are made absolute.

        Raises:
            DataError: there is no such folder or .tar.
            ConfigError: `root` is set for a source that is not a folder of embeddings.
        """
        given, path = path, Path(absolute(path))
        if not path.exists():
            raise DataError(f"{given}: no such folder")
        if path.is_file() and path.suffix != ".tar":
            raise DataError(f"{given}: not a folder of images or a .tar")
        if "ids" in read_index(path):
            return cls(str(path), absolute(root or "."))
        if root is not None:
            raise ConfigError(f"{given}: --root is for embeddings, and this folder has none")
        return cls(str(path))

    def weights(self) -> str | None:
        """The fingerprint of the weights that computed its features; None: it has no features."""
        return embeddings_index(Path(self.path))["weights"] if self.root is not None else None

    def entries(self) -> tuple[int, Iterator[tuple[Entry, np.ndarray | None]]]:
        """The number of images, and each of them, with its features (E,) if there are some.

        Raises:
            DataError: the source is gone or has no images, so that all of them would be dropped.
        """
        path = Path(self.path)
        if not path.exists():
            raise DataError(
                f"{path}: the source is gone; restore it, or build another index without it"
            )
        if self.root is not None:
            return embeddings_index(path)["images"], _embedded(path, Path(self.root))
        is_file = path.is_file()
        images, tars = ([], [path]) if is_file else (list_images(path), sorted(path.glob("*.tar")))
        if not images and not tars:
            raise no_images(path)
        for tar in filter(is_lfs_file, tars):
            raise DataError(f"{tar}: {LFS_POINTER}")
        total = len(images) + sum(len(shard_index(tar)) for tar in tars)
        return total, ((entry, None) for entry in _listed(path, images, tars))


class Content(NamedTuple):
    """An image that was read."""

    entry: Entry
    digest: bytes  # SHA-256 of the content
    number: int | None  # of the image in the index with the same content
    features: np.ndarray | None  # (E,), from the source
    pixels: np.ndarray | None  # `evaluation_pixels`, if features are to be computed


def read(
    entry: Entry,
    features: np.ndarray | None,
    preprocess: Preprocess,
    number_of: Callable[[bytes], int | None],
) -> Content:
    """Read the content and caption of an image, and its pixels unless features are available.

    Raises:
        SampleError: the image cannot be read.
    """
    if features is not None and not entry.mtime:  # the file is gone: its features stand for it
        digest = hashlib.sha256(features.tobytes()).digest()
        return Content(entry, digest, number_of(digest), features, None)
    content = read_bytes(entry.path, entry.shard, entry.start, entry.size)
    digest = hashlib.sha256(content).digest()
    number, pixels = number_of(digest), None
    if features is None and number is None:
        try:
            pixels = evaluation_pixels(content, preprocess)
        except SampleError as error:
            reason = str(error).replace("<bytes>", entry.path, 1)
            raise SampleError(error.kind, reason) from None
    return Content(with_caption(entry), digest, number, features, pixels)


def read_bytes(path: str, shard: str | None, start: int, size: int) -> bytes:
    """The content of an image file or of a member of a shard.

    Raises:
        SampleError: it cannot be read.
    """
    with image_errors(f"{shard or path}: "), open_regular_file(shard or path) as file:
        if shard is None:
            return file.read()
        file.seek(start)
        return file.read(size)


def with_caption(entry: Entry) -> Entry:
    """The entry with the content of the text file beside the image, if there is one."""
    if not entry.caption_mtime:
        return entry
    try:
        lines = read_lines(Path(entry.path).with_suffix(".txt"))
    except SampleError:  # an unreadable text is no reason to lose the image
        lines = []
    return entry._replace(caption="\n".join(lines) or None)


def _listed(path: Path, images: Sequence[Path], tars: Sequence[Path]) -> Iterator[Entry]:
    splits = splits_in("folder", path) if images else ()
    yield from filter(None, (_file(image, path, splits) for image in images))
    for tar in tars:
        yield from _members(tar)


def _embedded(path: Path, root: Path) -> Iterator[tuple[Entry, np.ndarray]]:
    splits = splits_in("folder", root)
    for ids, features in shards_of(path):
        for name, vector in zip(ids, np.asarray(features), strict=True):  # faster than a memmap
            image = root / name
            yield _file(image, root, splits) or Entry(str(image), 0, 0), vector


def _file(path: Path, root: Path, splits: Sequence[str]) -> Entry | None:
    """An image file; None if it is gone."""
    try:
        stat = path.stat()
    except OSError:
        return None
    try:
        caption_mtime = path.with_suffix(".txt").stat().st_mtime_ns
    except OSError:
        caption_mtime = 0
    folders = path.relative_to(root).parts[:-1] if path.is_relative_to(root) else ()
    if folders and folders[0] in splits:
        folders = folders[1:]
    label = readable(folders[0]) if folders else None
    return Entry(str(path), stat.st_size, stat.st_mtime_ns, label, caption_mtime=caption_mtime)


def _members(tar: Path) -> Iterator[Entry]:
    """The images of a shard."""
    path = tar.parent / "classes.txt"
    classes, keys = read_class_file(path) if path.is_file() else ClassFile((), ())
    labels = index_labels(classes, keys)
    rows = shard_index(tar)
    for line in shard_warnings([(str(tar), rows)]):
        log.warning("%s: %s", escaped(str(tar)), line)
    is_usable = (rows["image"] > 0) & (rows["problem"] == 0)
    if count := len(rows) - int(is_usable.sum()):
        names = ", ".join(map(os.fsdecode, rows["key"][~is_usable][:3].tolist()))
        names = escaped(names + ", ..." * (count > 3))
        place = escaped(str(tar))
        log.warning("%s: samples without a usable image, skipped: %d (%s)", place, count, names)
    mtime = tar.stat().st_mtime_ns
    with tar.open("rb") as file:

        def text(row: np.void, part: str) -> str | None:
            if not row[part] or row[f"{part}_size"] > MAX_TEXT_BYTES:
                return None
            content = os.pread(file.fileno(), int(row[f"{part}_size"]), int(row[part]))
            return content.decode("utf-8-sig", "replace").strip() or None

        for row in rows[is_usable]:
            label = text(row, "cls")
            if label in labels:
                label = classes[labels[label]]
            yield Entry(
                path=f"{tar}/{os.fsdecode(row['key'])}",
                size=int(row["image_size"]),
                mtime=mtime,
                label=label,
                caption=text(row, "txt"),
                shard=str(tar),
                start=int(row["image"]),
            )
