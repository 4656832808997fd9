"""Where an index's images come from, and what is there now.

    a folder       images at any depth, captions beside them (a.jpg, a.txt), and *.tar at its top
    a .tar         WebDataset's: members of one name are an image, its .txt and its .cls
    embeddings     what `leanclip embed` wrote: ids, which are paths below `root`, and features

An image's label is the first folder below the source, or below its split where the source has
folders train, val and so on; or what its shard says.
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
from leanclip.data.readers.tar_index import remarks
from leanclip.data.splits import splits_in
from leanclip.errors import ConfigError, DataError, SampleError, escaped
from leanclip.inference.embeddings import index_file, read_index, shards_of
from leanclip.io.files import LFS_POINTER, is_lfs_file, read_json_object
from leanclip.preprocess.decoding import open_regular, refusing
from leanclip.preprocess.images import Preprocess, evaluation_pixels
from leanclip.search.filters import absolute
from leanclip.search.items import Entry

log = logging.getLogger("leanclip")

MAX_TEXT_BYTES = 1 << 20  # bytes of a shard's text


@dataclass(frozen=True)
class Source:
    """A folder, a shard or a folder of embeddings; `root` is where the embeddings' ids are."""

    path: str
    root: str | None = None

    @classmethod
    def of(cls, given: str | Path, root: str | Path | None = None) -> "Source":
        """What a person named; paths become absolute.

        Raises:
            DataError: it is not there.
            ConfigError: a root where none is needed.
        """
        path = Path(absolute(given))
        if not path.exists():
            raise DataError(f"{given}: no such folder")
        if path.is_file() and path.suffix != ".tar":
            raise DataError(f"{given}: is a file; give a folder of images, or a .tar")
        if _is_embeddings(path):
            return cls(str(path), absolute(root or "."))
        if root is not None:
            raise ConfigError(f"{given}: holds no embeddings, which --root is for")
        return cls(str(path))

    def weights(self) -> str | None:
        """The weights that its features are of; None: it has none."""
        return read_index(Path(self.path)).weights if self.root is not None else None

    def entries(self) -> tuple[int, Iterator[tuple[Entry, np.ndarray | None]]]:
        """What is there: how much, and each image, with features (E,) where there are some.

        Raises:
            DataError: it is gone or empty, so that all of it would be dropped.
        """
        path = Path(self.path)
        if not path.exists():
            raise DataError(
                f"{path}: is not there any more; put it back, or build another index without it"
            )
        if self.root is not None:
            return read_index(path).images, _embedded(path, Path(self.root))
        is_file = path.is_file()
        images, tars = ([], [path]) if is_file else (list_images(path), sorted(path.glob("*.tar")))
        if not images and not tars:
            raise no_images(path)
        for tar in filter(is_lfs_file, tars):
            raise DataError(f"{tar}: {LFS_POINTER}")
        root = path.parent if is_file else path
        total = len(images) + sum(len(shard_index(tar)) for tar in tars)
        return total, _listed(images, tars, root)


class Found(NamedTuple):
    """An image that was read."""

    entry: Entry
    digest: bytes  # SHA-256 of its content
    features: np.ndarray | None  # (E,), where its source has them
    pixels: np.ndarray | None  # (3, R, R) uint8, where it must be embedded


def read(
    entry: Entry,
    features: np.ndarray | None,
    preprocess: Preprocess,
    is_known: Callable[[bytes], bool],
) -> Found:
    """Read an image's content and caption, and its pixels unless features are there or known.

    Raises:
        SampleError: it cannot be read.
    """
    if features is not None and not entry.mtime:  # its features are all that is left of it
        return Found(entry, hashlib.sha256(features.tobytes()).digest(), features, None)
    content = read_bytes(entry.path, entry.shard, entry.start, entry.size)
    digest = hashlib.sha256(content).digest()
    is_needed = features is None and not is_known(digest)
    pixels = evaluation_pixels(content, preprocess) if is_needed else None
    return Found(with_caption(entry), digest, features, pixels)


def read_bytes(path: str, shard: str | None, start: int, size: int) -> bytes:
    """The content of an image's file, or of a shard's member.

    Raises:
        SampleError: it is not there any more.
    """
    with refusing(f"{shard or path}: "), open_regular(shard or path) as file:
        if shard is None:
            return file.read()
        file.seek(start)
        return file.read(size)


def with_caption(entry: Entry) -> Entry:
    """The same with the text that lies beside the image, where there is one."""
    if not entry.caption_mtime:
        return entry
    try:
        lines = read_lines(Path(entry.path).with_suffix(".txt"))
    except SampleError:  # a text that is none is no reason to lose the image
        lines = []
    return entry._replace(caption="\n".join(lines) or None)


def _listed(
    images: Sequence[Path], tars: Sequence[Path], root: Path
) -> Iterator[tuple[Entry, None]]:
    splits = splits_in("folder", root)
    for image in images:
        if (entry := _file(image, root, splits)) is not None:
            yield entry, None
    for tar in tars:
        yield from ((entry, None) for entry in _members(tar, root))


def _embedded(path: Path, root: Path) -> Iterator[tuple[Entry, np.ndarray]]:
    splits = splits_in("folder", root)
    for ids, features in shards_of(path):
        for name, vector in zip(ids, np.asarray(features), strict=True):  # faster than a memmap
            image = root / name
            found = _file(image, root, splits)
            yield found or Entry(str(image), _below(image, root), 0, 0), vector


def _is_embeddings(path: Path) -> bool:
    """`leanclip data pack` writes an index.json too, beside its shards."""
    if any(path.glob("*.tar")):
        return False
    return "embed_dim" in read_json_object(index_file(path))


def _file(path: Path, root: Path, splits: Sequence[str]) -> Entry | None:
    """A file; None: it is gone."""
    try:
        stat = path.stat()
    except OSError:
        return None
    try:
        caption_mtime = path.with_suffix(".txt").stat().st_mtime_ns
    except OSError:
        caption_mtime = 0
    below = _below(path, root)
    first, _, rest = below.partition("/")
    label = readable(rest.split("/")[0] if first in splits else first) or None
    return Entry(
        str(path), below, stat.st_size, stat.st_mtime_ns, label, caption_mtime=caption_mtime
    )


def _members(tar: Path, root: Path) -> Iterator[Entry]:
    """The images of a shard."""
    path = tar.parent / "classes.txt"
    classes, keys = read_class_file(path) if path.is_file() else ClassFile((), ())
    labels = index_labels(classes, keys)
    stat, below = tar.stat(), _below(tar, root)
    with tar.open("rb") as file:

        def text(row: np.void, part: str) -> str | None:
            if not row[part] or row[f"{part}_size"] > MAX_TEXT_BYTES:
                return None
            content = os.pread(file.fileno(), int(row[f"{part}_size"]), int(row[part]))
            return content.decode("utf-8-sig", "replace").strip() or None

        rows = shard_index(tar)
        for line in remarks([(str(tar), rows)]):
            log.warning("%s: %s", escaped(str(tar)), line)
        is_usable = (rows["image"] > 0) & (rows["problem"] == 0)
        if count := len(rows) - int(is_usable.sum()):
            names = ", ".join(map(os.fsdecode, rows["key"][~is_usable][:3].tolist()))
            names += ", ..." * (count > 3)
            log.warning(
                "%s: samples without a usable image, skipped: %d (%s)",
                *(escaped(str(tar)), count, escaped(names)),
            )
        for row in rows[is_usable]:
            name = row["key"].decode("utf-8", "surrogateescape")
            label = text(row, "cls")
            if label in labels:
                label = classes[labels[label]]
            yield Entry(
                f"{tar}/{name}",
                below,
                int(row["image_size"]),
                stat.st_mtime_ns,
                label,
                caption=text(row, "txt"),
                shard=str(tar),
                start=int(row["image"]),
            )


def _below(path: Path, root: Path) -> str:
    try:
        below = path.parent.relative_to(root).as_posix()
    except ValueError:
        return ""
    return "" if below == "." else below
