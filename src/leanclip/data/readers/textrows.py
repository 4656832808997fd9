"""Rows of CSV, TSV and JSON lines, read where they lie.

    file -> its rows' offsets, once, in the cache -> a row: two reads of a few bytes -> its values

Neither rows nor offsets are kept in memory, so that it does not grow with the file.
"""

import contextlib
import csv
import io
import json
import os
import re
import struct
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path

import numpy as np

from leanclip.data.readers.cached import cached
from leanclip.data.readers.columns import check_count, several_labels, sorted_values
from leanclip.errors import DataError, SampleError
from leanclip.io.progress import ProgressBar

SUFFIXES = (".csv", ".tsv", ".jsonl", ".ndjson")
_CHUNK = 1 << 23  # bytes that are looked through at once
_MAX_LINE_BYTES = 1 << 27  # bytes without the end of a line: no text file
_MAX_ROW_BYTES = 1 << 24  # bytes; JSON may take twenty times as much memory
_MAX_LINES = 1000  # of a row; a quote that stays open longer was a slip
_BLOCK = 1 << 14  # rows
_HEAD, _SAMPLE_ROWS = 1 << 16, 20  # bytes and rows by which the delimiter is told
_SEPARATOR_LINE = re.compile(
    rb"""(?:\xef\xbb\xbf)?"?sep=([\t -!#-/:-@[-`{-~])\1*"?[ \t]*[\r\n]""", re.IGNORECASE
)
_NEWLINE, _RETURN, _QUOTE = b'\n\r"'


class TextRows:
    """The rows of a file; each a mapping from column to text, or to what JSON has there.

    Args:
        path: its suffix tells what it is.

    Raises:
        DataError: it has no rows, or is no such file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.delimiter, self._header = _format(path)
        self._file = _File(path)
        index = cached(
            [path],
            f"rows-{self.delimiter}",
            lambda part: _write_index(path, self.delimiter, part),
            lambda index: index if _ends_with(index, path.stat().st_size) else None,
        )
        self._index = _File(index)
        self.size = index.stat().st_size // 8 - 1 - self._header
        if self.size < 1:
            raise DataError(f"{path}: has no rows")
        self.columns = self._columns()

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> Mapping[str, object]:
        first, last = struct.unpack("<qq", self._index.read(8 * (index + self._header), 16))
        if last - first > _MAX_ROW_BYTES:
            raise SampleError(
                "oversized row",
                f"{self.name(index)}: {last - first} bytes, at most {_MAX_ROW_BYTES} are read",
            )
        return self._parse(self._file.read(first, last - first), self.name(index))

    def name(self, index: int) -> str:
        """A row in messages."""
        return f"{self.path} row {index + 1}"

    def distinct(self, column: str) -> list[str]:
        """The different values of a column, without those of malformed rows.

        Raises:
            DataError: there are too many.
        """

        def write(part: Path) -> None:
            values: set[str] = set()
            with ProgressBar(f"labels of {self.path.name}", self.size) as bar:
                for first in range(0, self.size, _BLOCK):
                    values.update(self._values(first, min(first + _BLOCK, self.size), column))
                    check_count(values, column, str(self.path))
                    bar.update(first)
            part.write_text(json.dumps(sorted_values(values)))

        kind = f"labels-{self.delimiter}-{column}"
        return cached([self.path], kind, write, _labels)

    def _columns(self) -> list[str]:
        if self._header:
            first, last = struct.unpack("<qq", self._index.read(8 * (self._header - 1), 16))
            fields = self._fields(self._file.read(first, last - first), f"{self.path} header")
            return [name.strip() for name in fields]
        found: dict[str, None] = {}
        for index in range(min(self.size, 100)):
            with contextlib.suppress(SampleError):
                found |= dict.fromkeys(self[index])
        if not found:
            raise DataError(f"{self.path}: none of the first rows is a JSON object")
        return list(found)

    def _parse(self, data: bytes, name: str) -> dict[str, object]:
        if self.delimiter is not None:
            fields = self._fields(data, name)
            if len(fields) != len(self.columns):
                raise SampleError(
                    "malformed row",
                    f"{name}: {len(fields)} fields under a header of {len(self.columns)}; is "
                    f"text with {self.delimiter!r} or quotes in it not quoted?",
                )
            return dict(zip(self.columns, fields, strict=True))
        try:
            row = json.loads(_text(data, name))
        except (ValueError, RecursionError):
            row = None
        if not isinstance(row, dict):
            raise SampleError("malformed row", f"{name}: is no JSON object")
        return row

    def _fields(self, data: bytes, name: str) -> list[str]:
        text = _text(data, name).rstrip("\r\n")
        if "\0" in text:
            raise SampleError("malformed row", f"{name}: has a NUL byte")
        try:
            return next(csv.reader([text], delimiter=self.delimiter or ",", strict=True))
        except (csv.Error, StopIteration) as error:
            raise SampleError("malformed row", f"{name}: {error}") from None

    def _values(self, first: int, last: int, column: str) -> set[str]:
        """What a column has in a block of rows."""
        raw = self._index.read(8 * (first + self._header), 8 * (last - first + 1))
        offsets = np.frombuffer(raw, "<i8")
        if int(offsets[-1] - offsets[0]) > _MAX_ROW_BYTES:
            if last - first > 1:
                middle = (first + last) // 2
                return self._values(first, middle, column) | self._values(middle, last, column)
            return set()  # a row that is not read
        data = self._file.read(int(offsets[0]), int(offsets[-1] - offsets[0]))
        if (values := self._plain_values(data, last - first, column)) is not None:
            return values
        ends = (offsets - offsets[0]).tolist()
        found = set()
        for index, (begin, end) in enumerate(pairwise(ends), first):
            with contextlib.suppress(SampleError):
                value = self._parse(data[begin:end], self.name(index)).get(column)
                if isinstance(value, list | dict):
                    raise several_labels(column, self.name(index))
                found.update(() if value is None else (str(value),))
        return found

    def _plain_values(self, data: bytes, count: int, column: str) -> set[str] | None:
        """The same, several times as fast, where each of `count` rows is as it should be."""
        try:
            if self.delimiter is None:
                rows = json.loads(b"[%b]" % b",".join(data.splitlines()))
                values = [row.get(column) for row in rows]
            else:
                place, width = self.columns.index(column), len(self.columns)
                lines = io.StringIO(data.decode("utf-8"), newline="")
                reader = csv.reader(lines, delimiter=self.delimiter, strict=True)
                values = [row[place] for row in reader if len(row) == width]
            found = set(values) if len(values) == count else None
        except (csv.Error, ValueError, TypeError, AttributeError, RecursionError):
            return None
        return found and {str(value) for value in found if value is not None}


class _File:
    """Reads at any place; opened by the process that reads, or handed on when it forks."""

    def __init__(self, path: Path) -> None:
        self.path, self._file = path, None

    def read(self, offset: int, length: int) -> bytes:
        if self._file is None:
            try:
                self._file = self.path.open("rb", buffering=0)
            except OSError as error:
                raise DataError(f"{self.path}: cannot be read: {error.strerror}") from None
        return os.pread(self._file.fileno(), length, offset)

    def __getstate__(self) -> dict[str, object]:
        return {"path": self.path, "_file": None}


def _text(data: bytes, name: str) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise SampleError("caption not UTF-8", f"{name}: is not UTF-8 text") from None


def _format(path: Path) -> tuple[str | None, int]:
    """What stands between the fields, and how many lines are before the first row.

    Of JSON lines, None and 0. Excel writes a line `sep=;` before the header.

    Raises:
        DataError: it is not UTF-8 text.
    """
    try:
        with path.open("rb") as file:
            head = file.read(_HEAD)
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from None
    _check_encoding(path, head)
    suffix = path.suffix.lower()
    if suffix in (".jsonl", ".ndjson"):
        return None, 0
    if stated := _SEPARATOR_LINE.match(head):
        return stated[1].decode("ascii"), 2
    return _delimiter(head, "\t,;|" if suffix == ".tsv" else ",\t;|"), 1


def _check_encoding(path: Path, head: bytes) -> None:
    """Refuse UTF-16 and UTF-32, with a byte order mark or without."""
    first = re.split(rb"[\r\n]", head, maxsplit=1)[0]
    zeros = [first[parity::2].count(0) for parity in (0, 1)]
    if head.startswith((b"\xff\xfe\0\0", b"\0\0\xfe\xff")) or b"\0\0\0" in first:
        raise DataError(f"{path}: is UTF-32 text, or no text; save it as UTF-8")
    is_every_other = min(zeros) == 0 and 3 * max(zeros) >= len(first) > 1
    if head.startswith((b"\xff\xfe", b"\xfe\xff")) or is_every_other:
        raise DataError(f"{path}: is UTF-16 text; save it as UTF-8")
    if any(zeros):
        raise DataError(f"{path}: has NUL bytes in its first line: UTF-16 or no text; use UTF-8")


def _delimiter(head: bytes, signs: str) -> str:
    """The sign that parts the header, outside of quotes, and most rows into as many fields."""
    text = head.removeprefix(b"\xef\xbb\xbf").decode("latin-1")
    best, most = signs[0], (0.0, 1)
    for sign in signs:
        counts: list[int] = []
        with contextlib.suppress(csv.Error):
            for row in csv.reader(io.StringIO(text, newline=""), delimiter=sign):
                counts += [len(row)] if row else []
                if len(counts) > _SAMPLE_ROWS:
                    break
        if len(head) == _HEAD and len(counts) > 1:
            counts.pop()  # which may be cut
        if counts and counts[0] > 1:
            score = counts.count(counts[0]) / len(counts), counts[0]
            best, most = (sign, score) if score > most else (best, most)
    return best


def _write_index(path: Path, delimiter: str | None, part: Path) -> None:
    """The offset of each row that is not blank, and the file's size: int64, little-endian."""
    size, base, data = path.stat().st_size, 0, b""
    with (
        path.open("rb") as file,
        part.open("wb") as index,
        ProgressBar(f"rows of {path.name}, MB", size >> 20) as bar,
    ):
        while True:
            chunk = file.read(_CHUNK)
            data += chunk
            starts, used = _row_starts(data, delimiter, final=not chunk)
            (starts + base).astype("<i8").tofile(index)
            base, data = base + used, data[used:]
            if len(data) > _MAX_LINE_BYTES:
                raise DataError(
                    f"{path}: {_MAX_LINE_BYTES >> 20} MB without a line's end: no text file"
                )
            bar.update(base >> 20)
            if not chunk:
                break
        np.array([base], "<i8").tofile(index)


def _ends_with(index: Path, size: int) -> bool:
    """Whether a file of offsets is whole: its last one is the table's size."""
    content = index.stat().st_size
    if content < 8 or content % 8:
        return False
    with index.open("rb") as file:
        file.seek(-8, os.SEEK_END)
        return struct.unpack("<q", file.read(8)) == (size,)


def _labels(path: Path) -> list[str]:
    """A list that `distinct` has kept."""
    return json.loads(path.read_text("utf-8"))


def _row_starts(data: bytes, delimiter: str | None, *, final: bool) -> tuple[np.ndarray, int]:
    """Where the whole rows in `data` begin, and where the last of them ends."""
    values = np.frombuffer(data, np.uint8)
    is_end = values == _NEWLINE
    if b"\r" in data:
        alone = values == _RETURN
        alone[:-1] &= values[1:] != _NEWLINE
        alone[-1] &= final  # else a newline may follow
        is_end |= alone
    ends = np.flatnonzero(is_end) + 1
    if final and len(data) and not is_end[-1]:
        ends = np.append(ends, len(data))
    starts = np.concatenate([[0], ends])[:-1]
    if not len(ends):
        return starts, 0
    kept = np.ones(len(starts), bool)
    if delimiter is not None and (values == _QUOTE).any():
        whole = _join_lines(data, starts, ends, kept, delimiter, final)
        starts, ends, kept = starts[:whole], ends[:whole], kept[:whole]
        if not whole:
            return starts, 0
    blank = (values[starts] == _NEWLINE) | (values[starts] == _RETURN)
    return starts[kept & ~blank], int(ends[-1])


def _join_lines(
    data: bytes,
    starts: np.ndarray,
    ends: np.ndarray,
    kept: np.ndarray,
    delimiter: str,
    final: bool,
) -> int:
    """Mark lines that go on a quoted field of the line before as not `kept`.

    Only a line with an odd number of quotes can leave one open. Gives how many lines are whole
    rows: all of them, or those before one that needs what follows `data`.
    """
    quotes = np.flatnonzero(np.frombuffer(data, np.uint8) == _QUOTE)
    lines_of_quotes = np.searchsorted(ends, quotes, side="right")
    counts = np.bincount(lines_of_quotes, minlength=len(starts))[: len(starts)]
    odd = np.flatnonzero(counts % 2)
    if not len(odd):
        return len(starts)
    text = data[: int(ends[-1])].decode("latin-1")
    lines = [text[a:b] for a, b in zip(starts.tolist(), ends.tolist(), strict=True)]
    row = int(odd[0])  # the first line of the next row
    while row < len(lines):
        first = row
        reader = csv.reader(
            map(lines.__getitem__, range(first, len(lines))), delimiter=delimiter, strict=True
        )
        try:
            for _ in reader:
                end = first + reader.line_num
                if end - row > _MAX_LINES:
                    break
                kept[row + 1 : end] = False
                row = end
            else:
                break
        except csv.Error:
            end = first + reader.line_num
            if not final and end == len(lines) and end - row < _MAX_LINES:
                return row
        row += 1  # the line alone is malformed, not what follows it
    return len(starts)
