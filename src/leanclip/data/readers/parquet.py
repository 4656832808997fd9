"""Rows of Parquet files, which are written once as Arrow's own format into the cache.

Parquet packs many rows together; one of them costs as much as all. Arrow's file has them in
batches of about 256 KB, read one at a time and not mapped: memory does not grow with the file.
"""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from leanclip.data.readers.cached import cached
from leanclip.data.readers.columns import check_count, sorted_values
from leanclip.errors import DataError, SampleError, one_line
from leanclip.io.optional_imports import need
from leanclip.io.progress import ProgressBar

if TYPE_CHECKING:
    import pyarrow

_BATCH = 1 << 18  # bytes
_FEW = 16  # rows
_MAX_BYTES, _MAX_GROWTH = 1 << 30, 200  # of a batch and a file; of a file over its own size


class ParquetRows:
    """The rows of some files of the same columns; each a mapping from column to value.

    Raises:
        DataError: pyarrow is missing, or a file is damaged, empty or of other columns.
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        self.paths = list(paths)
        files = [_open(path) for path in paths]
        with _reading(paths[0]):
            self.schema = files[0].schema_arrow
            self.columns = list(self.schema.names)
            self.size = sum(file.metadata.num_rows for file in files)
        if not self.size:
            raise DataError(f"{paths[0]}: has no rows")
        self.batch = self.size
        self.arrow = Path()
        self._opened: tuple[int, Any] = (0, None)

    def use(self, columns: Sequence[str]) -> None:
        """Have these columns ready; before rows are read.

        Raises:
            DataError: a file lacks one, or the cache folder has no room.
        """
        files = [_open(path) for path in self.paths]
        with _reading(self.paths[0]):
            size = sum(_bytes(file, columns) for file in files)
        self.batch = max(1, min(4096, _BATCH * self.size // max(size, 1)))

        def write(part: Path) -> None:
            _write_arrow(self.paths, list(columns), self.batch, self.size, part)

        kind = f"arrow-{','.join(columns)}-{self.batch}"
        self.arrow = cached(self.paths, kind, write, _whole_arrow, size=size)

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> Mapping[str, object]:
        batch, row = divmod(index, self.batch)
        try:
            return self._file().get_batch(batch).slice(row, 1).to_pylist()[0]
        except UnicodeDecodeError:
            raise SampleError(
                "caption not UTF-8", f"{self.name(index)}: is not UTF-8 text"
            ) from None

    def name(self, index: int) -> str:
        """A row in messages; of several files, counted from the first one's."""
        return f"{self.paths[0]} row {index + 1}"

    def distinct(self, column: str) -> list[str]:
        """The different values of a column.

        Raises:
            DataError: there are too many.
        """
        values: set[str] = set()
        for path in self.paths:
            with _reading(path):
                for batch in _open(path).iter_batches(batch_size=1 << 16, columns=[column]):
                    found = batch.column(0).unique().to_pylist()
                    values.update(str(value) for value in found if value is not None)
                    check_count(values, column, str(path))
        return sorted_values(values)

    def is_nested(self, column: str) -> bool:
        """Whether a column has lists or structs."""
        from pyarrow import types

        return types.is_nested(self.schema.field(column).type)

    def label_names(self, column: str) -> list[str] | None:
        """The names that Hugging Face's notes in the file give to a column of labels."""
        try:
            notes = json.loads((self.schema.metadata or {})[b"huggingface"])
            names = notes["info"]["features"][column]["names"]
        except (KeyError, TypeError, ValueError, RecursionError):
            return None
        return [str(name) for name in names] if isinstance(names, list) else None

    def _file(self) -> Any:
        import pyarrow

        process, file = self._opened
        if process != os.getpid():
            file = pyarrow.ipc.open_file(pyarrow.OSFile(str(self.arrow)))
            self._opened = os.getpid(), file
        return file

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_opened": (0, None)}


def _open(path: Path, columns: Sequence[str] = ()) -> Any:
    """A Parquet file; where it has the texts of `columns` each once, they are read so."""
    need("pyarrow", f"{path}: reading Parquet", extra="table", error=DataError)
    from pyarrow import parquet

    with _reading(path):
        file = parquet.ParquetFile(path)
        plain = {field.name for field in file.schema_arrow if not _is_list_view(field.type)}
        plain &= set(columns)  # Arrow casts no lists of dictionaries that are views
        once = [name for name in _dictionaries(file) if name.split(".")[0] in plain]
        return parquet.ParquetFile(path, read_dictionary=once) if once else file


def _is_list_view(type_: "pyarrow.DataType") -> bool:
    from pyarrow import types

    return types.is_list_view(type_) or types.is_large_list_view(type_)


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """What a damaged file has pyarrow raise is a DataError."""
    import pyarrow

    try:
        yield
    except (OSError, LookupError, ValueError, ArithmeticError, pyarrow.ArrowException) as error:
        raise DataError(f"{path}: cannot be read as Parquet: {one_line(error)}") from None


def _dictionaries(file: Any) -> list[str]:
    """The columns of texts or bytes whose values may stand for many rows."""
    if not file.metadata.num_row_groups:
        return []
    group = file.metadata.row_group(0)
    columns = [group.column(i) for i in range(group.num_columns)]
    return [
        column.path_in_schema
        for column in columns
        if column.physical_type == "BYTE_ARRAY"
        and any(name.endswith("DICTIONARY") for name in column.encodings)
    ]


def _bytes(file: Any, columns: Sequence[str]) -> int:
    """Of some columns, before Parquet packed them."""
    total = 0
    for group in range(file.metadata.num_row_groups):
        row_group = file.metadata.row_group(group)
        for i in range(row_group.num_columns):
            column = row_group.column(i)
            if column.path_in_schema.split(".")[0] in columns:
                total += column.total_uncompressed_size
    return total


def _write_arrow(
    paths: Sequence[Path], columns: list[str], rows: int, size: int, part: Path
) -> None:
    """Write the columns in batches of exactly `rows` rows, the last one smaller."""
    import pyarrow

    fields = [_open(paths[0]).schema_arrow.field(name) for name in columns]
    schema = pyarrow.schema([_plain(field) for field in fields])
    label = f"unpacking {paths[0].name}"
    with (
        ProgressBar(label, size) as bar,
        pyarrow.OSFile(str(part), "wb") as sink,
        pyarrow.ipc.new_file(sink, schema) as writer,
    ):
        done = 0
        for batch in _even(_read(paths, columns, schema, rows), rows):
            writer.write_batch(batch)
            done += batch.num_rows
            bar.update(done)


def _whole_arrow(path: Path) -> Path | None:
    """The file itself, if it is whole; else a ValueError of pyarrow."""
    import pyarrow

    with pyarrow.OSFile(str(path), "rb") as file:
        return path if pyarrow.ipc.open_file(file).num_record_batches else None


def _plain(field: "pyarrow.Field") -> "pyarrow.Field":
    """Of a type that Arrow's files take in any number of batches, and that all functions know.

    Without dictionaries of values (pandas' categories), of which a file has only one, and without
    the views that polars writes.
    """
    return field.with_type(_plain_type(field.type))


def _plain_type(type_: "pyarrow.DataType") -> "pyarrow.DataType":
    import pyarrow
    from pyarrow import types

    if types.is_dictionary(type_):
        return _plain_type(type_.value_type)
    if isinstance(type_, pyarrow.BaseExtensionType):
        return _plain_type(type_.storage_type)
    if types.is_string_view(type_):
        return pyarrow.large_string()
    if types.is_binary_view(type_):
        return pyarrow.large_binary()
    if types.is_list(type_):
        return pyarrow.list_(_plain(type_.value_field))
    if types.is_large_list(type_):
        return pyarrow.large_list(_plain(type_.value_field))
    if types.is_struct(type_):
        return pyarrow.struct([_plain(field) for field in type_])
    return type_


def _read(
    paths: Sequence[Path], columns: list[str], schema: "pyarrow.Schema", rows: int
) -> Iterator["pyarrow.Table"]:
    import pyarrow

    total = 0
    for path in paths:
        try:
            allowed = max(_MAX_BYTES, _MAX_GROWTH * path.stat().st_size)
            for batch in _batches(path, columns, 16 * rows):
                table = pyarrow.Table.from_batches([batch]).select(columns)
                for first in range(0, len(table), rows):
                    piece = table.slice(first, rows)
                    size = sum(_unpacked(part) for c in piece.columns for part in c.chunks)
                    total += size
                    if size > _MAX_BYTES or total > allowed:
                        raise DataError(
                            f"{path}: unpacks to over {_MAX_GROWTH} times its size: the same "
                            f"large values in many rows"
                        )
                    yield piece.cast(schema)
        except (OSError, KeyError, ValueError, pyarrow.ArrowException) as error:
            raise DataError(
                f"{path}: is damaged, or has other columns than {paths[0].name}: {one_line(error)}"
            ) from None


def _batches(path: Path, columns: list[str], rows: int) -> Iterator["pyarrow.RecordBatch"]:
    """The rows in batches of at most `rows`, one row group after the other."""
    import pyarrow

    file = _open(path, columns)
    for group in range(file.num_row_groups):
        done = 0
        try:
            for batch in file.iter_batches(rows, [group], columns):
                yield batch
                done += batch.num_rows
        # Arrow gives values within others (Hugging Face's images) of one dictionary at a time only.
        except pyarrow.ArrowNotImplementedError:
            few = min(rows, _FEW)  # each with its own value, however large
            for batch in _open(path).iter_batches(few, [group], columns):
                yield batch.slice(min(done, batch.num_rows))
                done -= min(done, batch.num_rows)


def _unpacked(array: Any) -> int:
    """Bytes of an array in which each row has its own value."""
    import pyarrow
    import pyarrow.compute

    compute: Any = pyarrow.compute  # whose functions are made when it is imported
    if isinstance(array, pyarrow.DictionaryArray):
        lengths = compute.fill_null(compute.binary_length(array.dictionary), 0)
        return compute.sum(lengths.cast("int64").take(array.indices.drop_null())).as_py() or 0
    if isinstance(array, pyarrow.StructArray):
        return sum(map(_unpacked, array.flatten()))
    if isinstance(array, pyarrow.ListArray | pyarrow.LargeListArray):
        return _unpacked(array.flatten())
    plain = _plain_type(array.type)  # a slice of views counts all bytes that any of them show
    return (array if plain == array.type else array.cast(plain)).nbytes


def _even(tables: Iterator["pyarrow.Table"], rows: int) -> Iterator["pyarrow.RecordBatch"]:
    """The same rows in batches of `rows`."""
    import pyarrow

    rest = None
    for table in tables:
        rest = table if rest is None else pyarrow.concat_tables([rest, table])
        whole = rest.num_rows // rows * rows
        for first in range(0, whole, rows):
            yield from rest.slice(first, rows).combine_chunks().to_batches()
        rest = rest.slice(whole)
    if rest is not None and rest.num_rows:
        yield from rest.combine_chunks().to_batches()
