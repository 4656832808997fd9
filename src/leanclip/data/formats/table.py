"""The `table` format: rows of CSV, TSV, JSON lines or Parquet, each an image with its captions.

    root                      a file
    root/<split>.csv          or .tsv, .jsonl, .parquet; train-00000-of-00002.parquet and so on

A column has the image (a path relative to the table, or in Parquet its bytes); others have
captions, or the class. Paths are looked for when they are read, not before.
"""

from pathlib import Path

from leanclip.config.data import DataConfig
from leanclip.data.dataset import Dataset, Sample
from leanclip.data.readers.columns import RowMapper, choose_columns, class_names, several_labels
from leanclip.data.readers.parquet import ParquetRows
from leanclip.data.readers.textrows import SUFFIXES, TextRows
from leanclip.errors import DataError
from leanclip.io.files import LFS_POINTER, is_lfs_file

_KNOWN = (*SUFFIXES, ".parquet")


def open_dataset(config: DataConfig) -> Dataset:
    """Find the rows, and what their columns mean.

    Raises:
        DataError: no file, no rows, no such columns, or classes without names.
    """
    paths = _files(Path(config.root), config.split)
    where = str(paths[0])
    for path in filter(is_lfs_file, paths):
        raise DataError(f"{path}: {LFS_POINTER}")
    rows = ParquetRows(paths) if paths[0].suffix.lower() == ".parquet" else TextRows(paths[0])
    columns = choose_columns(config, rows.columns, where)
    if isinstance(rows, ParquetRows):
        rows.use(columns.all)
    classes = None
    if label := columns.label:
        if isinstance(rows, ParquetRows) and rows.is_nested(label):
            raise several_labels(label, where)
        names = rows.label_names(label) if isinstance(rows, ParquetRows) else None
        classes = class_names(config, where, names, lambda: rows.distinct(label))
    return Table(rows, RowMapper(config, columns, paths[0].parent, classes))


class Table(Dataset):
    """Rows, and what their columns mean."""

    def __init__(self, rows: TextRows | ParquetRows, meaning: RowMapper) -> None:
        self.rows, self.meaning = rows, meaning
        self.classes, self.templates = meaning.classes, meaning.templates

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Sample:
        return self.meaning.sample(self.name(index), self.rows[index])

    def name(self, index: int) -> str:
        """The table and the row, counted from 1 below the header."""
        return self.rows.name(index)


def split_files(folder: Path, split: str) -> list[Path]:
    """The tables of a split in a folder: one file, or Parquet in parts."""
    return sorted(
        path
        for path in folder.iterdir()
        if path.suffix.lower() in _KNOWN
        and (
            path.stem == split
            or (path.suffix.lower() == ".parquet" and path.stem.startswith(f"{split}-"))
        )
    )


def _files(root: Path, split: str | None) -> list[Path]:
    """The file, or the Parquet files, of a split.

    Raises:
        DataError: there is none, or it is of another kind.
    """
    if root.is_file():
        if split is not None:
            raise DataError(f"data.split: {root} is a file; a split is a file in a folder")
        if root.suffix.lower() not in _KNOWN:
            more = "; unpack it first" if root.suffix.lower() in (".gz", ".zip", ".xz") else ""
            raise DataError(f"data.root: {root} is none of {' '.join(_KNOWN)}{more}")
        return [root]
    if not root.is_dir():
        raise DataError(f"data.root: no such table: {root}")
    wanted = split or "train"
    found = split_files(root, wanted)
    parts = [path for path in found if path.stem != wanted]
    if len(found) - len(parts) + bool(parts) != 1:
        tables = sorted(path.name for path in root.iterdir() if path.suffix.lower() in _KNOWN)
        names = ", ".join(tables[:8]) or "no tables"
        raise DataError(
            f"data.split: {root} should have one table {wanted} ({' '.join(_KNOWN)}), or "
            f"{wanted}-*.parquet; found: {names}"
        )
    return found
