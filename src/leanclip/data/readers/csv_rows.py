r"""CSV and TSV files as Arrow record batches.

    bytes -> whole rows, the malformed ones replaced -> pyarrow.csv -> record batches of strings

pyarrow parses quotes leniently: one that is never closed would take all rows up to the next quote
into its value. So a regular expression finds the rows that follow RFC 4180 first. A line ends with
`\n`, `\r\n` or `\r`.
"""

import contextlib
import csv
import io
import re
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import BinaryIO

import numpy as np
import pyarrow as pa
from pyarrow import csv as arrow_csv

from leanclip.data.readers.arrow_table import ERROR, TableFile
from leanclip.errors import DataError
from leanclip.io.progress import ProgressBar

_CHUNK = 1 << 20  # bytes parsed at once
MAX_ROW_BYTES = 1 << 24
_HEAD, _SAMPLE_ROWS = 1 << 16, 20  # bytes and rows that the delimiter is detected from
_LINE_END = re.compile(rb"\r\n?|\n")
_SEPARATOR_LINE = re.compile(
    rb"""(?:\xef\xbb\xbf)?"?sep=([\t -!#-/:-@[-`{-~])\1*"?[ \t]*[\r\n]""", re.IGNORECASE
)
_BOM = b"\xef\xbb\xbf"


def open_csv(path: Path) -> TableFile:
    """A CSV or TSV file; its first line is the header.

    Raises:
        DataError: it cannot be read or is not UTF-8 text.
    """
    with path.open("rb") as file:
        head = file.read(_HEAD)
    check_encoding(path, head)
    if separator_line := _SEPARATOR_LINE.match(head):  # which Excel writes
        delimiter, start = separator_line[1].decode("ascii"), separator_line.end()
    else:
        signs = "\t,;|" if path.suffix.lower() == ".tsv" else ",\t;|"
        delimiter, start = _detect_delimiter(head, signs), len(_BOM) * head.startswith(_BOM)
    header = _Grammar(delimiter).row.match(head + b"\n", start)
    if not head[start:].strip(b"\r\n"):
        raise DataError(f"{path}: has no rows")
    if header is None or header.end() > _HEAD:
        raise DataError(f"{path} header: an open quote, or over {_HEAD} bytes")
    try:
        text = header[0].decode().strip("\r\n")
    except UnicodeDecodeError:
        raise DataError(f"{path} header: is not UTF-8 text") from None
    names = next(csv.reader([text], delimiter=delimiter), [])
    columns = [name.strip() for name in names]
    read = partial(_batches, path, delimiter, columns, header.end())
    return TableFile([path], columns, read, options=delimiter)


class _Grammar:
    """Rows of CSV as regular expressions, by RFC 4180 but for bare quotes within a field.

    Attributes:
        row: blank lines and one row, with its line end.
        rows: as many rows as match.
        open_row: a row that the text ends within.
    """

    def __init__(self, delimiter: str) -> None:
        sign = re.escape(delimiter.encode())
        # A quote that stays open for a thousand lines is a mistake.
        text = rb'[^"\r\n\0]*+(?:(?:""|\r\n?|\n)[^"\r\n\0]*+){0,1000}+'
        field = rb'(?:"%b"|[^"%b\r\n\0][^%b\r\n\0]*+)?+' % (text, sign, sign)
        fields = rb"%b(?:%b%b)*+" % (field, sign, field)
        row = rb"%b(?:\r\n?|\n)" % fields
        self.row = re.compile(rb"[\r\n]*+%b" % row)
        self.rows = re.compile(rb"(?:%b)*+" % row)
        self.open_row = re.compile(rb'%b(?:"%b)?+\Z' % (fields, text))

    def end_of_rows(self, data: bytes, start: int, stop: int | None = None) -> int:
        """Where the last whole, well-formed row from `start` on ends, before `stop`."""
        found = self.rows.match(data, start, len(data) if stop is None else stop)
        assert found is not None  # of no rows too
        return found.end()


def _batches(
    path: Path, delimiter: str, names: Sequence[str], start: int, columns: Sequence[str]
) -> Iterator[pa.RecordBatch]:
    """Record batches of some columns, all of them strings, and of ERROR."""
    indices = [str(names.index(name)) for name in columns]
    replacement = delimiter.encode() * len(names)  # of a malformed row: has a field too many
    with (
        path.open("rb") as file,
        ProgressBar(f"reading {path.name}, MB", path.stat().st_size >> 20) as bar,
    ):
        file.seek(start)
        for rows in _whole_rows(file, _Grammar(delimiter), replacement):
            malformed: dict[int, str] = {}  # by row of this chunk, from 0

            def note(row: arrow_csv.InvalidRow, malformed: dict[int, str] = malformed) -> str:
                reason = row.text.partition("\0")[2] or (
                    f"malformed row: {row.actual_columns} fields under a header of "
                    f"{row.expected_columns}; is text with {delimiter!r} or quotes in it not "
                    f"quoted?"
                )
                malformed[row.number - 1] = reason
                return "skip"

            table = arrow_csv.read_csv(
                pa.BufferReader(rows),
                arrow_csv.ReadOptions(
                    use_threads=False,  # else rows have no numbers
                    block_size=len(rows) + 1,
                    column_names=[str(index) for index in range(len(names))],
                ),
                arrow_csv.ParseOptions(
                    delimiter=delimiter, newlines_in_values=True, invalid_row_handler=note
                ),
                arrow_csv.ConvertOptions(
                    include_columns=indices,
                    column_types=dict.fromkeys(indices, pa.string()),
                    strings_can_be_null=False,
                ),
            )
            yield from _with_errors(table.rename_columns(columns), malformed)
            bar.update(file.tell() >> 20)


def _with_errors(table: pa.Table, malformed: dict[int, str]) -> list[pa.RecordBatch]:
    """The rows, with null and the reason in the place of each malformed one."""
    is_good = np.ones(len(table) + len(malformed), bool)
    is_good[list(malformed)] = False
    if malformed:
        table = table.take(pa.array(np.cumsum(is_good) - 1, mask=~is_good))
    errors = [malformed.get(index) for index in range(len(table))] if malformed else None
    column = pa.array(errors, pa.string()) if errors else pa.nulls(len(table), pa.string())
    return table.append_column(ERROR, column).combine_chunks().to_batches()


def _whole_rows(file: BinaryIO, grammar: _Grammar, replacement: bytes) -> Iterator[bytes]:
    r"""The rest of a file in pieces of whole rows.

    A malformed row is `replacement`, `\0` and the reason: one of too many fields. Where a quote is
    not closed only its line is malformed.
    """
    data, is_last = b"", False
    while not is_last:
        chunk = file.read(_CHUNK)
        is_last = not chunk
        data += chunk or b"\n"
        pieces, start = [], 0
        while start < len(data):
            end = grammar.end_of_rows(data, start)
            pieces += _utf8_rows(data, start, end, grammar, replacement)
            is_open = grammar.open_row.match(data, end) is not None
            if is_open and not is_last and len(data) - end <= MAX_ROW_BYTES:
                start = end
                break
            if end < len(data):
                what = b"malformed row: a quote that is not closed or has text after it, or a NUL"
                if is_open and not is_last:
                    what = b"oversized row: over %d bytes" % MAX_ROW_BYTES
                pieces += [replacement, b"\0", what, b"\n"]
                while (line_end := _LINE_END.search(data, end)) is None:
                    data, end = file.read(_CHUNK) or b"\n", 0
                end = line_end.end()
            start = end
        if pieces:
            yield b"".join(pieces)
        data = data[start:]


def _utf8_rows(
    data: bytes, start: int, end: int, grammar: _Grammar, replacement: bytes
) -> Iterator[bytes | memoryview]:
    """Whole rows of CSV, those that are not UTF-8 replaced."""
    view = memoryview(data)
    while start < end:
        try:
            str(view[start:end], "utf-8")
        except UnicodeDecodeError as error:
            bad = grammar.end_of_rows(data, start, start + error.start)
            yield view[start:bad]
            yield replacement + b"\0caption not UTF-8: is not UTF-8 text\n"
            row = grammar.row.match(data, bad)
            assert row is not None
            start = row.end()
        else:
            yield view[start:end]
            return


def check_encoding(path: Path, head: bytes) -> None:
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


def _detect_delimiter(head: bytes, signs: str) -> str:
    """The sign that splits the header, outside of quotes, and most rows into as many fields."""
    text = head.removeprefix(_BOM).decode("latin-1")
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
