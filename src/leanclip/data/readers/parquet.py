"""Parquet files as Arrow record batches.

Parquet compresses many rows together, so that one row costs as much as all of its group: they
are decompressed once into the cache.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pyarrow as pa
from pyarrow.parquet import ParquetFile

from leanclip.data.readers.arrow_table import TableFile
from leanclip.errors import DataError, one_line
from leanclip.io.progress import ProgressBar

_BATCH_BYTES, _BATCH_ROWS = 1 << 22, 4096  # upper bounds of a record batch
_SAMPLE_ROWS = 16
_MAX_BYTES, _MAX_GROWTH = 1 << 30, 200  # of a decompressed file; over its own size


def open_parquet(paths: Sequence[Path]) -> TableFile:
    """Parquet files of the same columns as one table.

    Raises:
        DataError: the first one cannot be read.
    """
    with _reading(paths[0]):
        columns = ParquetFile(paths[0]).schema_arrow.names
    return TableFile(paths, columns, partial(_batches, paths))


def _batches(paths: Sequence[Path], columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
    with _reading(paths[0]):
        whole = ParquetFile(paths[0]).schema_arrow
        fields = [whole.field(name) for name in columns]
        schema = pa.schema(
            [field.with_type(_plain_type(field.type)) for field in fields], whole.metadata
        )
        total = sum(ParquetFile(path).metadata.num_rows for path in paths)
    done = 0
    with ProgressBar(f"unpacking {paths[0].name}", total) as bar:
        for path in paths:
            size, limit = 0, max(_MAX_BYTES, _MAX_GROWTH * path.stat().st_size)
            with _reading(path):
                for found in _groups(ParquetFile(path, pre_buffer=False), columns):
                    if not set(columns) <= set(found.schema.names):
                        raise DataError(f"{path}: has other columns than {paths[0].name}")
                    batch = found.select(columns).cast(schema)
                    size += batch.nbytes
                    if size > limit:
                        raise DataError(
                            f"{path}: unpacks to over {_MAX_GROWTH} times its size: the same "
                            f"large values in many rows"
                        )
                    yield batch
                    done += batch.num_rows
                    bar.update(done)


def _groups(file: ParquetFile, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
    """Record batches of about _BATCH_BYTES."""
    for group in range(file.num_row_groups):
        metadata = file.metadata.row_group(group)
        chunks = [metadata.column(i) for i in range(metadata.num_columns)]
        used = [chunk for chunk in chunks if chunk.path_in_schema.split(".")[0] in columns]
        row_bytes = sum(chunk.total_uncompressed_size for chunk in used) / max(1, metadata.num_rows)
        # Values that are stored once for many rows count in each row of a record batch.
        for sample in file.iter_batches(_SAMPLE_ROWS, [group], columns):
            row_bytes = max(row_bytes, sample.nbytes / sample.num_rows)
            break
        rows = max(1, min(_BATCH_ROWS, int(_BATCH_BYTES / max(row_bytes, 1))))
        yield from file.iter_batches(rows, [group], columns)


def _plain_type(type_: pa.DataType) -> pa.DataType:
    """The type without dictionaries and views.

    A column of an Arrow file has one dictionary; a slice of views is written with all bytes of the
    whole.
    """
    types = pa.types
    if types.is_dictionary(type_):
        return _plain_type(type_.value_type)
    if types.is_string_view(type_):
        return pa.large_string()
    if types.is_binary_view(type_):
        return pa.large_binary()
    if types.is_list(type_) or types.is_large_list(type_):
        return pa.large_list(_plain_type(type_.value_type))
    if types.is_struct(type_):
        return pa.struct([field.with_type(_plain_type(field.type)) for field in type_])
    return type_


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Errors of pyarrow in a damaged file as a DataError of one line."""
    try:
        yield
    except (OSError, LookupError, ValueError, ArithmeticError, pa.ArrowException) as error:
        raise DataError(f"{path}: cannot be read as Parquet: {one_line(error)}") from None
