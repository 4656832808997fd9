"""The `shards` format: WebDataset's tar files, as img2dataset and `leanclip data pack` write them.

    root[/split]/00000.tar ...     or one .tar, a pattern {00000..00099}.tar, http(s) URLs
        000000123.jpg  .txt | .json  [.cls]     members with the same key are one sample
    classes.txt, or data.class_names            (one name per line, by label: class data)
    templates.txt, or data.templates            (one caption per line, {} for the name)

A sample is read at its byte range in the tar, so that all have random access. An epoch shuffles
the shards, and all samples within windows of consecutive shards.
"""

import json
import logging
import os
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from threading import Thread
from typing import Any, NamedTuple

import numpy as np

from leanclip.config.data import DataConfig
from leanclip.data.dataset import (
    ClassFile,
    Dataset,
    Sample,
    StringArray,
    check_templates,
    check_unicode,
    class_file_in,
    fill,
    find_label,
    index_labels,
    read_class_file,
    templates_in,
)
from leanclip.data.order import shuffled
from leanclip.data.prompts import TEMPLATES
from leanclip.data.readers.shard_cache import (
    beside,
    fetched_path,
    fetched_shard,
    forget_failure,
    is_remote,
    read_file,
    shard_index,
)
from leanclip.data.readers.shard_list import count_samples, find_shards, stated_sizes
from leanclip.data.readers.tar_index import PROBLEMS, decoded, shard_warnings
from leanclip.errors import DataError, SampleError
from leanclip.io.files import LFS_POINTER, is_lfs_file, split_lines

log = logging.getLogger("leanclip")

CAPTION_KEYS = ("caption", "captions", "text", "title")  # of a .json, the first there is
MAX_BYTES = {"image": 1 << 28, "txt": 1 << 20, "json": 1 << 20, "cls": 1 << 20}  # of a member
_MAX_OPEN = 128  # shards that a process keeps open


def open_dataset(config: DataConfig) -> Dataset:
    """Find the shards and their sizes; those whose size is not stated are indexed.

    Raises:
        DataError: no shards, one is missing or no tar file, a file beside them is damaged or
            cannot be fetched, or there are no samples.
    """
    shards = find_shards(config)
    for shard in filter(is_remote, shards):
        forget_failure(shard)
    stated = stated_sizes(shards)
    unknown = [shard for shard, size in zip(shards, stated, strict=True) if size is None]
    counted = iter(count_samples(unknown, config.cache_gigabytes * 1e9) if unknown else ())
    sizes = [next(counted) if size is None else size for size in stated]
    if sum(sizes) == 0:
        raise DataError(f"{config.root}: no samples in {len(shards)} shards")
    classes, keys = _classes(shards[0], config)
    templates = _templates(shards[0], config) if classes else ()
    dataset = Shards(shards, sizes, config, classes, templates, keys)
    dataset.has_reported = len(unknown) == len(shards) and not is_remote(shards[0])
    if len(shards) == 1 and (unknown or not is_remote(shards[0])):
        with suppress(SampleError):
            dataset.check_tar(0)
    return dataset


class _OpenShard(NamedTuple):
    file: Any  # unbuffered; closed when the last reference is gone
    rows: np.ndarray  # of `shard_index`


class Shards(Dataset):
    """Samples in tar files.

    Attributes:
        has_reported: what is odd about a shard has been logged; further shards are not reported.
    """

    def __init__(
        self,
        shards: Sequence[str],
        sizes: Sequence[int],
        config: DataConfig,
        classes: Sequence[str],
        templates: Sequence[str],
        keys: Sequence[str] = (),
    ) -> None:
        for shard in shards:
            if not is_remote(shard) and is_lfs_file(shard):
                raise DataError(f"{shard}: {LFS_POINTER}")
        self.shards, self.firsts = StringArray(shards), np.cumsum([0, *sizes])
        self.buffer, self.limit = config.shuffle_buffer, config.cache_gigabytes * 1e9
        columns = config.caption_column
        self.columns = (columns,) if isinstance(columns, str) else columns
        self.one_caption_per_line = config.one_caption_per_line
        self.classes, self.labels = classes, index_labels(classes, keys)
        self.templates = templates
        self.has_reported = self._has_warned = False
        self._open_shards: OrderedDict[int, _OpenShard] = OrderedDict()  # least recently used first

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_open_shards": OrderedDict()}  # files cannot be pickled

    def __len__(self) -> int:
        return int(self.firsts[-1])

    def __getitem__(self, index: int) -> Sample:
        shard, i = self._place(index)
        opened = self._open(shard)
        name, found = self.name(index), len(opened.rows)
        if i >= found:
            stated = self.firsts[shard + 1] - self.firsts[shard]
            message = f"{name}: the shard has {found} samples; the file beside it states {stated}"
            raise SampleError("missing in shard", message)
        row = opened.rows[i]
        if problem := PROBLEMS[row["problem"]]:
            raise SampleError(problem, f"{name}: {problem}{_hint(row)}")
        if not row["image"]:
            raise SampleError("missing image", f"{name}: no image with this key{_hint(row)}")
        label = None
        if self.classes:
            label = self._label(opened, row, name)
            captions = fill(self.templates, self.classes[label])
        else:
            captions = self._captions(opened, row, name)
        return Sample(name, _read(opened, row, "image", name), captions, label)

    @property
    def has_random_access(self) -> bool:
        """Whether every shard is on this machine."""
        return all(not is_remote(one) or fetched_path(one).is_file() for one in self.shards)

    def name(self, index: int) -> str:
        """The shard and the sample's key; its number in a shard that would have to be fetched."""
        shard, i = self._place(index)
        with suppress(DataError, OSError):
            is_here = shard in self._open_shards or not is_remote(self.shards[shard])
            if is_here and i < len(rows := self._open(shard).rows):
                return f"{self.shards[shard]}/{decoded(rows[i]['key'])}"
        return f"{self.shards[shard]}/sample {i}"

    def data_warnings(self) -> list[str]:
        """What is odd about the shards on this machine."""

        def indices() -> Iterator[tuple[str, np.ndarray]]:
            for shard in self.shards:
                with suppress(DataError, OSError):
                    if not is_remote(shard) or fetched_path(shard).is_file():
                        yield shard, shard_index(shard, self.limit)

        return shard_warnings(indices())

    def visits(self, key: Sequence[int], start: int = 0) -> Iterator[int | Sample]:
        """Shards in an order drawn by `key`, the samples of a window of shards mixed.

        A window has at least `shuffle_buffer` samples. The next one is fetched in the background.
        """
        order = np.array(list(shuffled(len(self.shards), key)))
        ends = np.cumsum(np.diff(self.firsts)[order])  # positions in the epoch
        begins, positions = [0], [0]  # of each window: its first place in `order`, and position
        while begins[-1] < len(order):
            begins.append(int(np.searchsorted(ends, positions[-1] + self.buffer)) + 1)
            positions.append(int(ends[min(begins[-1], len(order)) - 1]))
        current = bisect_right(positions[:-1], start) - 1
        for number in range(current, len(begins) - 1):
            window = order[begins[number] : begins[number + 1]].tolist()
            ahead = order[begins[number] : begins[min(number + 2, len(begins) - 1)]].tolist()
            Thread(target=self._prepare, args=(ahead,), daemon=True).start()
            skipped = max(start - positions[number], 0)
            yield from self._window(window, [*key, number + 1], skipped)

    def check_tar(self, shard: int) -> None:
        """Refuse a shard that is no tar file at all.

        Raises:
            DataError: it is not.
            SampleError: it cannot be fetched or read.
        """
        rows = self._open(shard).rows
        if len(rows) and PROBLEMS[rows[0]["problem"]] == "not a tar file":
            raise DataError(f"{self.shards[shard]}: is not a tar file, or a compressed one")

    def _place(self, index: int) -> tuple[int, int]:
        """The shard, and the row in its index."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        shard = int(np.searchsorted(self.firsts, index, side="right")) - 1
        return shard, index - int(self.firsts[shard])

    def _window(self, shards: Sequence[int], key: Sequence[int], start: int) -> Iterator[int]:
        """The indices of all samples of some shards, mixed."""
        firsts = self.firsts[shards].tolist()
        sizes = np.diff(self.firsts)[shards]
        begins = np.cumsum([0, *sizes]).tolist()
        for position in shuffled(begins[-1], key, start):
            which = bisect_right(begins, position) - 1
            yield firsts[which] + position - begins[which]

    def _prepare(self, shards: Sequence[int]) -> None:
        """Fetch and index shards before they are needed, for all processes."""
        for shard in shards:
            with suppress(DataError, OSError):  # reported when a sample of it is read
                self._load(self.shards[shard])

    def _load(self, shard: str) -> _OpenShard:
        path = fetched_shard(shard, self.limit) if is_remote(shard) else Path(shard)
        return _OpenShard(path.open("rb", buffering=0), shard_index(shard, self.limit))

    def _open(self, number: int) -> _OpenShard:
        if number in self._open_shards:
            self._open_shards.move_to_end(number)
            return self._open_shards[number]
        shard = self.shards[number]
        try:
            try:
                opened = self._load(shard)
            except FileNotFoundError:  # another process has evicted it meanwhile
                opened = self._load(shard)
        except OSError as error:
            message = f"{shard}: cannot be read: {error.strerror}"
            raise SampleError("unreadable shard", message) from None
        self._report(number, opened.rows)
        self._open_shards[number] = opened
        if len(self._open_shards) > _MAX_OPEN:
            self._open_shards.popitem(last=False)
        return opened

    def _report(self, number: int, rows: np.ndarray) -> None:
        """Log what is odd about a shard, of the first such one."""
        shard, stated = self.shards[number], int(self.firsts[number + 1] - self.firsts[number])
        if len(rows) > stated and not self._has_warned:
            self._has_warned = True
            message = "%s: of its %d samples only the %d stated in the file beside it are used"
            log.warning(message, shard, len(rows), stated)
        if not self.has_reported and (lines := shard_warnings([(shard, rows)])):
            self.has_reported = True
            log.warning("%s: %s (further shards are not reported)", shard, "; ".join(lines))

    def _captions(self, opened: _OpenShard, row: np.void, name: str) -> Sequence[str]:
        if row["txt"] and not self.columns:
            captions = self._lines(opened, row, name)
        elif row["json"]:
            captions = _json_captions(_json_object(opened, row, name), self.columns, name)
        else:
            hint = "; its .cls needs data.class_names" if row["cls"] else _hint(row)
            raise SampleError("missing caption", f"{name}: no caption with this key{hint}")
        captions = [caption for caption in captions if caption]
        if not captions:
            raise SampleError("empty caption", f"{name}: an empty caption")
        check_unicode(captions, name)
        return captions

    def _lines(self, opened: _OpenShard, row: np.void, name: str) -> list[str]:
        """The captions in a .txt: its lines, or all of it where it is known to be one caption."""
        text = _text(opened, row, "txt", name)
        lines = [line for line in map(str.strip, split_lines(text)) if line]
        if len(lines) > 1 and not self.one_caption_per_line:
            return ["\n".join(lines)]
        if len(lines) > 1 and row["json"]:
            with suppress(SampleError):  # beside a .txt a damaged .json does no harm
                texts = _strings(_json_object(opened, row, name).values())
                return [one for one in texts if one.split() == text.split()][:1] or lines
        return lines

    def _label(self, opened: _OpenShard, row: np.void, name: str) -> int:
        if not row["cls"]:
            raise SampleError("missing label", f"{name}: no .cls with this key{_hint(row)}")
        text = _text(opened, row, "cls", name).strip()
        text = str(int(text)) if text.isdecimal() and len(text) < 10 else text  # 007
        return find_label(text, self.labels, self.classes, name)


def _hint(row: np.void) -> str:
    """What a sample that lacks something has instead."""
    names = decoded(row["unread"]).replace("/", ", ")
    hint = f"; members that are not read: {names}" if names else ""
    if PROBLEMS[row["problem"]] == "unknown extension":
        hint += "; call them NAME.jpg and NAME.txt, without further dots"
    return hint


def _read(opened: _OpenShard, row: np.void, part: str, name: str) -> bytes:
    """The content of a member."""
    size = int(row[f"{part}_size"])
    if size > MAX_BYTES[part]:
        message = f"{name}: {size} bytes of {part}, at most {MAX_BYTES[part]}"
        raise SampleError(f"oversized {part}", message)
    content = os.pread(opened.file.fileno(), size, int(row[part]))
    if len(content) < size:
        raise SampleError("truncated shard", f"{name}: the shard was cut while it was in use")
    return content


def _text(opened: _OpenShard, row: np.void, part: str, name: str) -> str:
    try:
        return _read(opened, row, part, name).decode("utf-8-sig")
    except UnicodeDecodeError:
        raise SampleError("caption not UTF-8", f"{name}: its .{part} is not UTF-8 text") from None


def _json_object(opened: _OpenShard, row: np.void, name: str) -> dict[str, Any]:
    """The object in a .json; an empty one in place of other values."""
    text = _text(opened, row, "json", name)
    try:
        values = json.loads(text)
    except (ValueError, RecursionError):
        raise SampleError("damaged JSON", f"{name}: its .json is not JSON") from None
    return values if isinstance(values, dict) else {}


def _json_captions(
    values: dict[str, Any], columns: Sequence[str] | None, name: str
) -> Sequence[str]:
    """The strings under the given keys, or under the first of CAPTION_KEYS."""
    keys = columns or [key for key in CAPTION_KEYS if values.get(key)][:1]
    captions = _strings(values.get(key) for key in keys)
    if not captions:
        wanted = ", ".join(columns or CAPTION_KEYS)
        raise SampleError("missing caption", f"{name}: its .json has no caption ({wanted})")
    return captions


def _strings(values: Iterable[Any]) -> list[str]:
    """The strings among values and lists of them, stripped."""
    flat = [one for value in values for one in (value if isinstance(value, list) else [value])]
    return [one.strip() for one in flat if isinstance(one, str)]


def _classes(shard: str, config: DataConfig) -> ClassFile:
    """The names of classes; none of data with captions."""
    if config.caption_column is None and config.class_names is not None:
        return read_class_file(Path(config.class_names))
    if config.caption_column is None and (found := _class_data(shard, config, "classes.txt")):
        return class_file_in(found[1], where=found[0])
    return ClassFile((), ())


def _templates(shard: str, config: DataConfig) -> Sequence[str]:
    if config.templates is not None:
        return check_templates(config.templates)
    if found := _class_data(shard, config, "templates.txt"):
        return templates_in(found[1], where=found[0])
    return TEMPLATES


def _class_data(shard: str, config: DataConfig, name: str) -> tuple[str, bytes] | None:
    """Path or URL and content of a file beside the shards, or in the folder of the splits."""
    places = [beside(shard, name)]
    if config.split is not None:
        places.append(str(Path(config.root) / name))
    for place in places:
        if (content := read_file(place)) is not None:
            return place, content
    return None
