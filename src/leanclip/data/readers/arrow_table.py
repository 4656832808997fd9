"""Rows of a table of any kind, by index, from one Arrow file in the cache.

CSV, TSV, JSON lines, Parquet -> record batches, read once -> Arrow file -> {column: value}

The file is read a small batch at a time and not memory-mapped: where a mapped file is damaged, or
its disk fails, the process is killed (SIGBUS) in place of an exception.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pyarrow as pa

from leanclip.data.readers.cached import cached
from leanclip.data.readers.columns import check_count, several_labels, sorted_values
from leanclip.errors import DataError, SampleError

ERROR = "leanclip.error"  # a column of a batch: "kind: reason" of a malformed row, else null
_BATCH_BYTES, _BATCH_ROWS = 1 << 16, 4096  # upper bounds of what is read for one row


@dataclass(frozen=True)
class TableFile:
    """Files of the same columns, not yet read.

    Attributes:
        paths: their rows follow each other.
        columns: names, as in the file.
        read: yields record batches of the given columns, and of ERROR where rows may be malformed.
        options: settings of the reader that change the rows; part of the cache key.
        is_json: values are JSON texts.
    """

    paths: Sequence[Path]
    columns: Sequence[str]
    read: Callable[[Sequence[str]], Iterator[pa.RecordBatch]]
    options: str = ""
    is_json: bool = False


class ArrowTable:
    """Rows by index, each a mapping from column to value. Pickles without its data.

    Args:
        file: what to read.
        columns: what rows have; other columns are not read.

    Raises:
        DataError: it has no rows or cannot be read, or the cache folder cannot be written.
    """

    def __init__(self, file: TableFile, columns: Sequence[str]) -> None:
        self.name, self.is_json = str(file.paths[0]), file.is_json
        kind = f"arrow-{json.dumps([file.options, *columns])}"
        self.path = cached(
            file.paths, kind, lambda part: _write(file, columns, part), _check_arrow_file
        )
        last = self._arrow.num_record_batches - 1
        self.batch_rows = self._arrow.get_batch(0).num_rows
        self.size = last * self.batch_rows + self._arrow.get_batch(last).num_rows

    @cached_property
    def _arrow(self) -> Any:
        return pa.ipc.open_file(pa.OSFile(str(self.path)))

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_arrow"}

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> dict[str, Any]:
        number, offset = divmod(index, self.batch_rows)
        (row,) = self._arrow.get_batch(number).slice(offset, 1).to_pylist()
        if error := row.pop(ERROR, None):
            kind, _, reason = error.partition(": ")
            raise SampleError(kind, f"{self.name} row {index + 1}: {reason}")
        return {name: self._value(value) for name, value in row.items()}

    def distinct(self, column: str) -> list[str]:
        """The sorted distinct values of a column of labels, as texts; malformed rows have none.

        Raises:
            DataError: there are too many, or values are lists.
        """
        if pa.types.is_nested(self._arrow.schema.field(column).type):
            raise several_labels(column, self.name)
        found = self._arrow.get_batch(0).column(column).slice(0, 0)  # pa.array imports pandas
        for number in range(self._arrow.num_record_batches):
            values = self._arrow.get_batch(number).column(column).unique()
            found = pa.concat_arrays([found, values]).unique()
            check_count(found, column, self.name)
        texts = set()
        for scalar in found:
            with suppress(UnicodeDecodeError):
                value = self._value(scalar.as_py())
                if isinstance(value, list | dict):
                    raise several_labels(column, self.name)
                texts.update(() if value is None else (str(value),))
        return sorted_values(texts)

    def label_names(self, column: str) -> list[str] | None:
        """The class names in the metadata that `datasets` writes to Parquet."""
        try:
            metadata = json.loads((self._arrow.schema.metadata or {})[b"huggingface"])
            names = metadata["info"]["features"][column]["names"]
        except (KeyError, TypeError, ValueError, RecursionError):
            return None
        return [str(name) for name in names] if isinstance(names, list) else None

    def _value(self, value: Any) -> Any:
        return json.loads(value) if self.is_json and value is not None else value


def _write(file: TableFile, columns: Sequence[str], path: Path) -> None:
    """Write batches of equally many rows, the last one smaller."""
    rows, rest, writer = 0, None, None
    with pa.OSFile(str(path), "wb") as sink:
        for batch in file.read(columns):
            table = pa.Table.from_batches([batch])
            rest = table if rest is None else pa.concat_tables([rest, table])
            if writer is None and rest.num_rows:
                writer = pa.ipc.new_file(sink, rest.schema)
                rows = max(1, min(_BATCH_ROWS, _BATCH_BYTES * rest.num_rows // (rest.nbytes + 1)))
            if writer is not None:
                whole = rest.num_rows // rows * rows
                writer.write_table(rest.slice(0, whole).combine_chunks(), rows)
                rest = rest.slice(whole)
        if writer is None or rest is None:
            raise DataError(f"{file.paths[0]}: has no rows")
        writer.write_table(rest.combine_chunks())
        writer.close()


def _check_arrow_file(path: Path) -> Path:
    """The path; pyarrow raises a ValueError where the file is not whole."""
    with pa.OSFile(str(path)) as file:
        pa.ipc.open_file(file)
    return path
