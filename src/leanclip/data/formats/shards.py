"""The `shards` format: WebDataset's tar files, as img2dataset and `leanclip data pack` write them.

    root[/split]/00000.tar ...     or one .tar, a pattern {00000..00099}.tar, http(s) URLs
        000000123.jpg  .txt | .json  [.cls]     members of one name are one sample
    classes.txt, or data.class_names            (a name a line, by label: class data)
    templates.txt, or data.templates            (a caption a line, {} for the name)

A sample is read at its place in the file, so that any can be had by index. What shuffles them is
the order of the shards, and within windows of neighbours an order of all their samples.
"""

import json
import logging
import os
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterator, Sequence
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
    count_samples,
    fetched_note,
    fetched_path,
    forget_failure,
    ready_shard,
)
from leanclip.data.readers.shard_list import URLS, beside, find_shards, read_local, stated_sizes
from leanclip.data.readers.tar_index import PROBLEMS, Remarks
from leanclip.errors import DataError, SampleError
from leanclip.io.files import LFS_POINTER, is_lfs_file, split_lines

log = logging.getLogger("leanclip")

CAPTION_KEYS = ("caption", "captions", "text", "title")  # of a .json, the first there is
MAX_IMAGE_BYTES = 1 << 28
MAX_TEXT_BYTES = 1 << 20
_OPEN = 128  # shards a process holds open


def open_dataset(config: DataConfig) -> Dataset:
    """Find the shards and how many samples each has; those of which nothing says so are read.

    Raises:
        DataError: no shards, one that is not there or no tar file, an address that may not be
            fetched, a damaged file of sizes, or no samples.
    """
    shards = find_shards(config)
    for shard in shards:
        if shard.startswith(URLS):
            forget_failure(shard)
    stated = stated_sizes(shards, _read)
    unknown = [shard for shard, size in zip(shards, stated, strict=True) if size is None]
    counted = dict(zip(unknown, count_samples(unknown, config) if unknown else (), strict=True))
    sizes = [counted[s] if size is None else size for s, size in zip(shards, stated, strict=True)]
    if sum(sizes) == 0:
        raise DataError(f"{config.root}: no samples in {len(shards)} shards")
    classes, keys = _classes(shards[0], config)
    dataset = Shards(shards, sizes, config, classes, _templates(shards[0], config), keys)
    dataset.has_remarked = len(unknown) == len(shards) and not shards[0].startswith(URLS)
    if len(shards) == 1 and (unknown or not shards[0].startswith(URLS)):
        with suppress(SampleError):  # of one sample; here only what is wrong with all counts
            dataset.check_tar(0)
    return dataset


class _Opened(NamedTuple):
    """A shard at hand."""

    file: Any  # unbuffered; closes itself when nothing refers to it
    rows: np.ndarray  # see tar_index.shard_index


class Shards(Dataset):
    """Samples in tar files."""

    def __init__(
        self,
        shards: Sequence[str],
        sizes: Sequence[int],
        config: DataConfig,
        classes: Sequence[str],
        templates: Sequence[str] = (),
        keys: Sequence[str] = (),
    ) -> None:
        for shard in shards:
            if not shard.startswith(URLS) and is_lfs_file(shard):
                raise DataError(f"{shard}: {LFS_POINTER}")
        self.shards, self.firsts = StringArray(shards), np.cumsum([0, *sizes])
        self.buffer, self.limit = config.shuffle_buffer, config.cache_gigabytes * 1e9
        columns = config.caption_column
        self.columns = (columns,) if isinstance(columns, str) else columns
        self.one_caption_per_line = config.one_caption_per_line
        self.classes, self.labels = classes, index_labels(classes, keys)
        if classes:
            self.templates = templates
        self._opened: OrderedDict[int, _Opened] = OrderedDict()
        self._has_warned = self.has_remarked = False

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_opened": OrderedDict()}  # files do not go to other processes

    def __len__(self) -> int:
        return int(self.firsts[-1])

    def __getitem__(self, index: int) -> Sample:
        shard, i = self._place(index)
        opened = self._open(shard)
        if i >= len(opened.rows):
            raise SampleError(
                "missing in shard",
                f"{self.name(index)}: the shard holds {len(opened.rows)} samples, "
                f"{self.firsts[shard + 1] - self.firsts[shard]} are stated beside it",
            )
        row, name = opened.rows[i], self.name(index)
        if problem := PROBLEMS[row["problem"]]:
            raise SampleError(problem, f"{name}: {problem}{_hint(row)}")
        if not row["image"]:
            raise SampleError(
                "missing image", f"{name}: there is no image of this name{_hint(row)}"
            )
        captions, label = self._captions(opened, row, name)
        image = _member(opened, row, "image", name, MAX_IMAGE_BYTES)
        return Sample(name, image, captions, label)

    @property
    def has_random_access(self) -> bool:
        """Whether every shard is on this machine, with no need to fetch it again and again."""
        return all(not one.startswith(URLS) or fetched_path(one).is_file() for one in self.shards)

    def name(self, index: int) -> str:
        """The shard, and the sample's name in it."""
        shard, i = self._place(index)
        with suppress(DataError, OSError):
            at_hand = shard in self._opened or not self.shards[shard].startswith(URLS)
            if at_hand and i < len(rows := self._open(shard).rows):
                return f"{self.shards[shard]}/{rows[i]['key'].decode('utf-8', 'surrogateescape')}"
        return f"{self.shards[shard]}/sample {i}"

    def remarks(self) -> list[str]:
        """What is odd about the shards that are at hand."""
        found = Remarks()
        for name in self.shards[:]:
            with suppress(DataError, OSError):
                path = fetched_path(name) if name.startswith(URLS) else Path(name)
                if path.is_file():
                    found += Remarks.of(name, ready_shard(name, self.limit)[1])
        return found.lines()

    def visits(self, key: Sequence[int], start: int = 0) -> Iterator[int | Sample]:
        """Shards in an order drawn by `key`; all samples of a window of them mixed."""
        order = np.array(list(shuffled(len(self.shards), key)))
        ends = np.cumsum(np.diff(self.firsts)[order])
        windows, begin = [], 0  # of places in `order`
        while begin < len(order):
            before = int(ends[begin - 1]) if begin else 0
            end = int(np.searchsorted(ends, before + self.buffer)) + 1
            windows.append((before, order[begin:end].tolist()))
            begin = end
        current = bisect_right([before for before, _ in windows], start) - 1
        for number in range(current, len(windows)):
            before, shards = windows[number]
            ahead = [shard for _, some in windows[number : number + 2] for shard in some]
            Thread(target=self._prepare, args=(ahead,), daemon=True).start()
            yield from self._window(shards, [*key, number + 1], max(start - before, 0))

    def check_tar(self, shard: int) -> None:
        """Refuse a shard that is no tar file at all.

        Raises:
            DataError: it is not.
            SampleError: it cannot be fetched or read.
        """
        opened = self._open(shard)
        if len(opened.rows) and PROBLEMS[opened.rows[0]["problem"]] == "not a tar file":
            raise DataError(f"{self.shards[shard]}: is not a tar file, or a compressed one")

    def _place(self, index: int) -> tuple[int, int]:
        """Which shard, and which sample of it."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        shard = int(np.searchsorted(self.firsts, index, side="right")) - 1
        return shard, index - int(self.firsts[shard])

    def _window(self, shards: Sequence[int], key: Sequence[int], start: int) -> Iterator[int]:
        """The indices of all samples of some shards, mixed."""
        firsts = [int(self.firsts[shard]) for shard in shards]
        begins = np.cumsum(
            [0, *(int(self.firsts[shard + 1] - self.firsts[shard]) for shard in shards)]
        )
        begins = begins.tolist()
        for position in shuffled(begins[-1], key, start):
            which = bisect_right(begins, position) - 1
            yield firsts[which] + position - begins[which]

    def _prepare(self, shards: Sequence[int]) -> None:
        """Fetch and look through shards before they are needed, for other processes too."""
        for shard in shards:
            with suppress(DataError, OSError):  # whoever reads a sample of it meets it again
                ready_shard(self.shards[shard], self.limit)

    def _open(self, shard: int) -> _Opened:
        if shard in self._opened:
            self._opened.move_to_end(shard)
            return self._opened[shard]
        name = self.shards[shard]
        try:
            try:
                opened = _opened(name, self.limit)
            except FileNotFoundError:  # it has just made room for another
                opened = _opened(name, self.limit)
        except OSError as error:
            raise SampleError(
                "unreadable shard", f"{name}: cannot be read: {error.strerror}"
            ) from None
        stated = int(self.firsts[shard + 1] - self.firsts[shard])
        if len(opened.rows) > stated and not self._has_warned:
            self._has_warned = True
            log.warning(
                "%s: of its %d samples only the %d that are stated beside it are used",
                name,
                len(opened.rows),
                stated,
            )
        if not self.has_remarked and (lines := Remarks.of(name, opened.rows).lines()):
            self.has_remarked = True
            log.warning("%s: %s (further shards are not reported)", name, "; ".join(lines))
        self._opened[shard] = opened
        if len(self._opened) > _OPEN:
            self._opened.popitem(last=False)
        return opened

    def _captions(
        self, opened: _Opened, row: np.void, name: str
    ) -> tuple[Sequence[str], int | None]:
        """A sample's captions, and its label in class data."""
        if self.classes:
            label = self._label(opened, row, name)
            return fill(self.templates, self.classes[label]), label
        if row["txt"] and not self.columns:
            captions = self._lines(opened, row, name)
        elif row["json"]:
            captions = _json_captions(_text(opened, row, "json", name), self.columns, name)
        else:
            hint = "; its .cls needs data.class_names" if row["cls"] else _hint(row)
            raise SampleError("missing caption", f"{name}: there is no caption of this name{hint}")
        captions = [caption for caption in captions if caption]
        if not captions:
            raise SampleError("empty caption", f"{name}: an empty caption")
        check_unicode(captions, name)
        return captions, None

    def _lines(self, opened: _Opened, row: np.void, name: str) -> list[str]:
        """The captions in a .txt: its lines, or all of it where it is known to be one caption."""
        text = _text(opened, row, "txt", name)
        lines = [line for line in map(str.strip, split_lines(text)) if line]
        if len(lines) > 1 and not self.one_caption_per_line:
            return ["\n".join(lines)]
        if len(lines) > 1 and row["json"]:
            with suppress(SampleError):  # a .json is not needed beside a .txt
                return _whole_in(_text(opened, row, "json", name), text) or lines
        return lines

    def _label(self, opened: _Opened, row: np.void, name: str) -> int:
        if not row["cls"]:
            raise SampleError("missing label", f"{name}: there is no .cls of this name{_hint(row)}")
        text = _text(opened, row, "cls", name).strip()
        text = str(int(text)) if text.isdecimal() and len(text) < 10 else text  # 007
        return find_label(text, self.labels, self.classes, name)


def _hint(row: np.void) -> str:
    """What a sample that lacks something has instead."""
    names = row["unread"].decode("utf-8", "surrogateescape").replace("/", ", ")
    hint = f"; members that are not read: {names}" if names else ""
    if PROBLEMS[row["problem"]] == "unknown extension":
        hint += "; call them NAME.jpg and NAME.txt, without further dots"
    return hint + "; others of this name stand elsewhere in the shard" * bool(row["is_apart"])


def _opened(shard: str, limit: float) -> _Opened:
    path, rows = ready_shard(shard, limit)
    return _Opened(path.open("rb", buffering=0), rows)


def _member(opened: _Opened, row: np.void, part: str, name: str, most: int) -> bytes:
    """The content of a member."""
    size = int(row[f"{part}_size"])
    if size > most:
        raise SampleError(f"oversized {part}", f"{name}: {size} bytes of {part}, at most {most}")
    content = os.pread(opened.file.fileno(), size, int(row[part]))
    if len(content) < size:
        raise SampleError("truncated shard", f"{name}: the shard was cut while it was in use")
    return content


def _text(opened: _Opened, row: np.void, part: str, name: str) -> str:
    try:
        return _member(opened, row, part, name, MAX_TEXT_BYTES).decode("utf-8-sig")
    except UnicodeDecodeError:
        raise SampleError("caption not UTF-8", f"{name}: its .{part} is not UTF-8 text") from None


def _whole_in(text: str, caption: str) -> list[str]:
    """The caption, line breaks and all, if a .json has it as one text."""
    try:
        facts = json.loads(text)
    except (ValueError, RecursionError):
        return []
    values = facts.values() if isinstance(facts, dict) else ()
    texts = [one for value in values for one in (value if isinstance(value, list) else [value])]
    whole = caption.split()
    return [one.strip() for one in texts if isinstance(one, str) and one.split() == whole][:1]


def _json_captions(text: str, columns: Sequence[str] | None, name: str) -> list[str]:
    """The strings under the given keys, or under the first usual one."""
    try:
        facts = json.loads(text)
    except (ValueError, RecursionError):
        raise SampleError("damaged JSON", f"{name}: its .json is not JSON") from None
    facts = facts if isinstance(facts, dict) else {}
    keys = columns or [key for key in CAPTION_KEYS if facts.get(key)][:1]
    values = [facts.get(key) for key in keys]
    found = [one for value in values for one in (value if isinstance(value, list) else [value])]
    captions = [caption.strip() for caption in found if isinstance(caption, str)]
    if not captions:
        wanted = ", ".join(columns or CAPTION_KEYS)
        raise SampleError("missing caption", f"{name}: its .json has no caption ({wanted})")
    return captions


def _read(path: str) -> bytes | None:
    return fetched_note(path) if path.startswith(URLS) else read_local(path)


def _classes(shard: str, config: DataConfig) -> ClassFile:
    """Names of classes by label, of class data."""
    if config.caption_column is not None:
        return ClassFile((), ())
    if config.class_names is not None:
        return read_class_file(Path(config.class_names))
    for place in _places(shard, config, "classes.txt"):
        if (content := _read(place)) is not None:
            return class_file_in(content, where=place)
    return ClassFile((), ())


def _templates(shard: str, config: DataConfig) -> Sequence[str]:
    """Templates of class data: the config's, those in a file beside the names, the usual one."""
    if config.templates is not None:
        return check_templates(config.templates)
    for place in _places(shard, config, "templates.txt"):
        if (content := _read(place)) is not None:
            return templates_in(content, where=place)
    return TEMPLATES


def _places(shard: str, config: DataConfig, name: str) -> list[str]:
    """Where a file of words about the classes may be."""
    root = [] if config.split is None else [str(Path(config.root) / name)]
    return [beside(shard, name), *root]
