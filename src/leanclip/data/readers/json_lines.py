"""JSON lines as Arrow record batches: a column of JSON texts for each key that is used."""

import json
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa

from leanclip.data.readers.arrow_table import ERROR, TableFile
from leanclip.data.readers.csv_rows import MAX_ROW_BYTES, check_encoding
from leanclip.errors import DataError, SampleError
from leanclip.io.progress import ProgressBar

_BATCH_ROWS, _BATCH_BYTES = 4096, 1 << 22
_HEADER_ROWS = 100  # whose keys are the columns


def open_json_lines(path: Path) -> TableFile:
    """A file of one JSON object per line.

    Raises:
        DataError: it cannot be read, or has no object in its first lines.
    """
    with path.open("rb") as file:
        check_encoding(path, file.read(1 << 16))
    columns: dict[str, None] = {}
    is_empty = True
    for row in islice(_rows(path), _HEADER_ROWS):
        is_empty = False
        columns |= dict.fromkeys(row if isinstance(row, dict) else ())
    if is_empty:
        raise DataError(f"{path}: has no rows")
    if not columns:
        raise DataError(f"{path}: none of the first rows is a JSON object")
    return TableFile([path], list(columns), partial(_batches, path), options="json", is_json=True)


def _batches(path: Path, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
    """Record batches of JSON texts, null where a row has none, and of ERROR."""
    names = [*columns, ERROR]
    rows = _rows(path)
    with ProgressBar(f"reading {path.name}, MB", path.stat().st_size >> 20) as bar:
        done = 0
        while True:
            values: list[list[str | None]] = [[] for _ in names]
            size = 0
            for row in islice(rows, _BATCH_ROWS):
                texts = _texts(row, columns)
                for column, text in zip(values, texts, strict=True):
                    column.append(text)
                size += sum(len(text) for text in texts if text)
                if size > _BATCH_BYTES:
                    break
            if not values[-1]:
                return
            yield pa.record_batch([pa.array(column, pa.string()) for column in values], names)
            done += size
            bar.update(done >> 20)


def _texts(row: dict[str, Any] | SampleError, columns: Sequence[str]) -> list[str | None]:
    """The value of each column as JSON, and of ERROR."""
    if isinstance(row, SampleError):
        return [*(None for _ in columns), f"{row.kind}: {row}"]
    return [*(json.dumps(row[name]) if name in row else None for name in columns), None]


def _rows(path: Path) -> Iterator[dict[str, Any] | SampleError]:
    """The object of each line that is not blank, or what is wrong with the line."""
    with path.open(encoding="utf-8-sig", errors="surrogateescape") as file:
        while line := file.readline(MAX_ROW_BYTES + 1):
            if len(line) > MAX_ROW_BYTES and not line.endswith("\n"):
                while (rest := file.readline(MAX_ROW_BYTES)) and not rest.endswith("\n"):
                    pass
                yield SampleError("oversized row", f"over {MAX_ROW_BYTES} bytes")
            elif not line.isspace():
                yield _object(line)


def _object(line: str) -> dict[str, Any] | SampleError:
    try:
        line.encode()
        row = json.loads(line)
    except UnicodeEncodeError:
        return SampleError("caption not UTF-8", "is not UTF-8 text")
    except (ValueError, RecursionError):
        row = None
    return row if isinstance(row, dict) else SampleError("malformed row", "is no JSON object")
