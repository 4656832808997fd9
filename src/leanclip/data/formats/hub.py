"""The `hub` format: a data set of Hugging Face's `datasets`, by id or from the disk.

    user/name   user/name:config        on the hub
    a folder of save_to_disk, or anything that load_dataset reads: Parquet, CSV, folders of images

Settings: split, templates, class_names, image_column, caption_column, label_column, streaming.
Rows become samples as those of a table (readers/columns.py); `datasets` does not decode images. A
stream is read file by file in shuffled order, and shuffled in blocks of `shuffle_buffer` rows.
"""

import os
import re
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import chain, count, islice
from pathlib import Path
from typing import Any

from leanclip.config.data import DataConfig
from leanclip.data.dataset import Dataset, Sample
from leanclip.data.order import shuffled
from leanclip.data.readers.columns import (
    IMAGES,
    RowDataset,
    RowMapper,
    check_count,
    choose_columns,
    class_names,
    several_labels,
    usual_column,
)
from leanclip.errors import DataError, SampleError, one_line
from leanclip.io.files import LFS_POINTER, is_lfs_file
from leanclip.io.optional_imports import import_optional

_SUFFIXES = {
    ".parquet": "parquet",
    ".csv": "csv",
    ".json": "json",
    ".jsonl": "json",
    ".arrow": "arrow",
}

# Usual names that precede columns of type Image with other names, whatever their own type; a path
# or file name beside a column of images is usually metadata.
_IMAGES = ("image", "image_path", "img", "jpg", "jpeg", "png", "webp")


def open_dataset(config: DataConfig) -> Dataset:
    """Open a split, and find the columns of images, captions and labels.

    Raises:
        DataError: `datasets` is missing, it cannot be opened, or lacks columns.
    """
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")  # read when it is imported
    datasets = import_optional("datasets", "data.format: hub", extra="hub", error=DataError)
    with _errors_of(config.root):
        rows = _load(config)
        # A stream of text files has no features; its first row has the columns.
        features: dict[str, Any] = rows.features or dict.fromkeys(next(iter(rows), ()))
    streaming = isinstance(rows, datasets.IterableDataset)
    images = [name for name, kind in features.items() if isinstance(kind, datasets.Image)]
    if images and config.image_column is None:
        image = usual_column(images, IMAGES) or usual_column(features, _IMAGES) or images[0]
        config = config.model_copy(update={"image_column": image})
    columns = choose_columns(config, list(features), config.root)
    rows = rows.select_columns(columns.all)
    if isinstance(features[columns.image], datasets.Image):
        rows = rows.cast_column(columns.image, datasets.Image(decode=False))
    classes = None
    if label := columns.label:
        if not isinstance(features[label], datasets.ClassLabel | datasets.Value | None):
            raise several_labels(label, config.root)
        names = getattr(features[label], "names", None)
        distinct = None if streaming else lambda: _distinct(rows, label, config.root)
        classes = class_names(config, config.root, names, distinct)
    root = Path(config.root)
    mapper = RowMapper(config, columns, root.parent if root.is_file() else root, classes)
    if streaming:
        return Stream(rows, mapper, config)
    if not len(rows):
        raise DataError(f"data.root: {config.root}: has no rows")
    return RowDataset(rows, mapper, config.root)


class Stream(Dataset):
    """Rows that are read in order and not stored; `visits` yields samples, not indices."""

    is_stream = True

    def __init__(self, rows: Any, mapper: RowMapper, config: DataConfig) -> None:
        self.rows, self.mapper, self.root = rows, mapper, config.root
        self.classes, self.templates = mapper.classes, mapper.templates
        self.block = config.shuffle_buffer
        # Rows may refer to files of their own repository; no others are fetched.
        name = re.escape(config.root.partition(":")[0])
        self._own_file = re.compile(rf"((zip|tar)://[^:]*::)?hf://datasets/{name}[@/][^:]*")
        split = (rows.info.splits or {}).get(str(rows.split))
        size = (split.num_examples if split else None) or config.epoch_size
        if not size:
            raise DataError(
                f"data.root: {config.root}: the number of rows of its stream is unknown; set "
                f"data.epoch_size"
            )
        self.size: int = size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> Sample:
        raise DataError(
            f"data.streaming: {self.root}: a stream has no row {index}; set data.streaming: false "
            f"to evaluate on it"
        )

    def visits(self, key: Sequence[int], start: int = 0) -> Iterator[int | Sample]:
        """Samples from position `start` on; the rows before it are read and skipped."""
        left = len(self) - start
        for epoch in count():
            found = 0
            for sample in islice(self._once([*key, epoch], start), left):
                found += 1
                yield sample
            left -= found
            if not left:
                return
            if found or not start:
                rows = found
                start = 0
            else:  # `start` is beyond the last row
                rows = sum(1 for _ in self.rows)
                start -= rows
            if not rows:
                raise DataError(f"data.root: {self.root}: has no rows")

    def _once(self, key: Sequence[int], start: int) -> Iterator[Sample]:
        """Every row once."""
        first, skip = divmod(start, self.block)
        # Not by `datasets`' own shuffle: it reads files in threads, in no fixed order.
        files = self.rows.num_shards
        rows = chain.from_iterable(
            self.rows.shard(files, file) for file in shuffled(files, [*key, 0])
        )
        with _errors_of(self.root):
            next(islice(rows, first * self.block, first * self.block), None)
        for number in count(first):
            with _errors_of(self.root):
                block = list(islice(rows, self.block))
            if not block:
                return
            for place in shuffled(len(block), [*key, number + 1], skip):
                yield self._sample(block[place])
            skip = 0

    def _sample(self, row: Mapping[str, Any]) -> Sample:
        """The sample of a row; a bad row keeps its place as a sample with an error."""
        image = row[self.mapper.columns.image]
        path, content = "row", None
        if isinstance(image, Mapping):
            path, content = image.get("path") or path, image.get("bytes")
            if content is None and self._own_file.fullmatch(path):
                with _errors_of(f"{self.root}: {path}"):
                    content = _fetched(path)
                row = {**row, self.mapper.columns.image: content}
        elif isinstance(image, bytes):
            content = image
        # The rows of a shuffled stream have no fixed numbers; their content identifies them.
        name = f"{self.root}/{path}#{zlib.crc32(content or repr(row).encode()):08x}"
        try:
            return self.mapper.sample(name, row)
        except SampleError as error:
            return Sample(name, b"", (), error=error)


def _load(config: DataConfig) -> Any:
    """One split, as a data set of `datasets`."""
    import datasets

    root, split = Path(config.root), config.split or "train"
    for path in (root,) if root.is_file() else root.rglob("*.*"):
        if path.suffix.lower() in _SUFFIXES and is_lfs_file(path):
            raise DataError(f"{path}: {LFS_POINTER}")
    if (root / "state.json").is_file() or (root / "dataset_dict.json").is_file():
        saved = datasets.load_from_disk(str(root))
        if isinstance(saved, datasets.Dataset):
            if config.split not in (None, str(saved.split)):
                raise DataError(
                    f"data.split: {root} is one saved data set (split {saved.split}), with no "
                    f"{split}; set data.split to null"
                )
            return saved
        if split not in saved:
            raise DataError(f"data.split: {root} has {', '.join(map(str, saved))}, no {split}")
        return saved[split]
    if root.is_file():
        if root.suffix.lower() not in _SUFFIXES:
            raise DataError(f"data.root: {root} is none of {' '.join(_SUFFIXES)}")
        if split != "train":
            raise DataError(f"data.split: {root} is a file; a split is a file in a folder")
        kind = _SUFFIXES[root.suffix.lower()]
        files = {split: str(root)}
        return datasets.load_dataset(
            kind, data_files=files, split=split, streaming=config.streaming
        )
    if root.is_dir():
        path, name = str(root.resolve()), None
    else:
        path, _, name = config.root.partition(":")
        if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", path):
            raise DataError(f"data.root: no such folder, and no id on the hub: {config.root}")
    return datasets.load_dataset(path, name or None, split=split, streaming=config.streaming)


def _fetched(path: str) -> bytes:
    """A file of a data set on the hub that a row refers to."""
    from fsspec.core import url_to_fs

    files, place = url_to_fs(path)
    return files.cat_file(place)


def _distinct(rows: Any, column: str, where: str) -> set[str]:
    values = {str(value) for value in rows.unique(column) if value is not None}
    check_count(values, column, where)
    return values


@contextmanager
def _errors_of(root: str) -> Iterator[None]:
    """Errors of `datasets`, of any library below it, as a DataError of one line."""
    try:
        yield
    except DataError:
        raise
    except Exception as error:
        causes: list[BaseException] = [error]
        while (cause := causes[-1].__cause__) is not None and cause not in causes:
            causes.append(cause)
        reasons = ": ".join(map(one_line, causes))
        raise DataError(f"data.root: {root}: cannot be read: {reasons}") from None
