"""The `table` format: rows of CSV, TSV, JSON lines or Parquet, each an image with its captions.

    root                      a file
    root/<split>.csv          or .tsv, .jsonl, .parquet; train-00000-of-00002.parquet and so on

Settings: split, templates, class_names, image_column, caption_column, label_column.
One column is the image (a path relative to the table, or in Parquet its bytes), others are captions
or the class: readers/columns.py. Image files are not looked for until they are read.
"""

from pathlib import Path
from typing import TYPE_CHECKING

from leanclip.config.data import DataConfig
from leanclip.data.dataset import Dataset
from leanclip.data.readers.columns import RowDataset, RowMapper, choose_columns, class_names
from leanclip.errors import DataError
from leanclip.io.files import LFS_POINTER, is_lfs_file

if TYPE_CHECKING:
    from leanclip.data.readers.arrow_table import TableFile

_JSON_SUFFIXES = (".jsonl", ".ndjson")
_SUFFIXES = (".csv", ".tsv", *_JSON_SUFFIXES, ".parquet")


def open_dataset(config: DataConfig) -> Dataset:
    """Find the rows, and the columns of images, captions and labels.

    Raises:
        DataError: no file, no rows, no such columns, or classes without names.
    """
    from leanclip.data.readers.arrow_table import ArrowTable  # pyarrow takes 0.1 s to import

    paths = _files(Path(config.root), config.split)
    where = str(paths[0])
    file = _open(paths)
    columns = choose_columns(config, file.columns, where)
    rows = ArrowTable(file, columns.all)
    classes = None
    if label := columns.label:
        names = rows.label_names(label)
        classes = class_names(config, where, names, lambda: rows.distinct(label))
    return RowDataset(rows, RowMapper(config, columns, paths[0].parent, classes), where)


def _open(paths: list[Path]) -> "TableFile":
    for path in filter(is_lfs_file, paths):
        raise DataError(f"{path}: {LFS_POINTER}")
    suffix = paths[0].suffix.lower()
    try:
        if suffix == ".parquet":
            from leanclip.data.readers.parquet import open_parquet

            return open_parquet(paths)
        if suffix in _JSON_SUFFIXES:
            from leanclip.data.readers.json_lines import open_json_lines

            return open_json_lines(paths[0])
        from leanclip.data.readers.csv_rows import open_csv

        return open_csv(paths[0])
    except OSError as error:
        raise DataError(f"{paths[0]}: cannot be read: {error.strerror}") from None


def split_files(folder: Path, split: str) -> list[Path]:
    """The tables of a split in a folder: one file, or parts of Parquet."""
    return sorted(
        path
        for path in folder.iterdir()
        if path.suffix.lower() in _SUFFIXES
        and (
            path.stem == split
            or (path.suffix.lower() == ".parquet" and path.stem.startswith(f"{split}-"))
        )
    )


def _files(root: Path, split: str | None) -> list[Path]:
    """The file or the parts of Parquet of a split.

    Raises:
        DataError: there is none, several, or it is of another kind.
    """
    if root.is_file():
        if split is not None:
            raise DataError(f"data.split: {root} is a file; a split is a file in a folder")
        if root.suffix.lower() not in _SUFFIXES:
            more = "; unpack it first" if root.suffix.lower() in (".gz", ".zip", ".xz") else ""
            raise DataError(f"data.root: {root} is none of {' '.join(_SUFFIXES)}{more}")
        return [root]
    if not root.is_dir():
        raise DataError(f"data.root: no such table: {root}")
    wanted = split or "train"
    found = split_files(root, wanted)
    parts = [path for path in found if path.stem != wanted]
    if len(found) - len(parts) + bool(parts) != 1:
        tables = sorted(path.name for path in root.iterdir() if path.suffix.lower() in _SUFFIXES)
        names = ", ".join(tables[:8]) or "no tables"
        raise DataError(
            f"data.split: {root} should have one table {wanted} ({' '.join(_SUFFIXES)}), or "
            f"{wanted}-*.parquet; found: {names}"
        )
    return found
