"""The columns of a table: which one is the image, which are captions or the class.

names of columns -> Columns;   a row as {column: value} -> Sample
"""

from collections.abc import Callable, Iterable, Mapping, Sequence, Sized
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from leanclip.config.data import DataConfig
from leanclip.data.dataset import (
    Dataset,
    Sample,
    check_unicode,
    choose_templates,
    fill,
    find_label,
    index_labels,
    read_class_file,
    sorted_names,
)
from leanclip.errors import DataError, SampleError
from leanclip.io.files import URL_IN_DATA, is_url
from leanclip.preprocess.image_formats import SUFFIXES

# Names that are looked for in this order, in any letter case, where the config names no column.
IMAGES = (
    "image",
    "image_path",
    "image_name",
    "img",
    "filepath",
    "file_path",
    "path",
    "file_name",
    "filename",
    "jpg",
    "jpeg",
    "png",
    "webp",
)
CAPTIONS = ("caption", "captions", "text", "txt", "title", "sentence", "sentences", "description")
LABELS = ("label", "labels", "class", "cls", "category", "target")
MAX_CLASSES = 100_000
MAX_PATH_LENGTH = 1000  # characters


@dataclass(frozen=True)
class Columns:
    """The columns that are used."""

    image: str
    captions: tuple[str, ...]  # empty in class data
    label: str | None = None

    @property
    def all(self) -> list[str]:
        """Each once."""
        return list(dict.fromkeys([self.image, *self.captions, *filter(None, [self.label])]))


def choose_columns(config: DataConfig, found: Sequence[str], where: str) -> Columns:
    """The columns that the config names, else the first usual ones among those found.

    Raises:
        DataError: there are no such columns.
    """

    def missing(setting: str, what: str) -> DataError:
        columns = ", ".join(repr(name) if "," in name else name for name in found)[:300]
        hint = ""
        if where.lower().endswith((".csv", ".tsv")):
            _check_header(found, where)
            is_named = any(usual_column(found, names) for names in (IMAGES, CAPTIONS, LABELS))
            hint = "" if is_named else ", or write the columns' names above the first row"
        return DataError(f"{where}: {what}; set data.{setting} (columns: {columns}){hint}")

    if config.caption_column and config.label_column:
        raise DataError("data: give caption_column or label_column, not both")
    given = config.caption_column or ()
    captions = (given,) if isinstance(given, str) else given
    for setting, name in (
        ("image_column", config.image_column),
        ("label_column", config.label_column),
        *(("caption_column", caption) for caption in captions),
    ):
        if name is not None and name not in found:
            raise missing(setting, f"has no column {name!r}")
    image, label = config.image_column or usual_column(found, IMAGES), config.label_column
    if image is None:
        at_urls = [name for name in found if "url" in name.lower()]
        hint = f" ({at_urls[0]} {URL_IN_DATA})" if at_urls else ""
        raise missing("image_column", f"no column of images found{hint}")
    if not captions and label is None:
        others = [name for name in found if name.lower() != image.lower()]
        caption = usual_column(others, CAPTIONS)
        captions = (caption,) if caption else ()
        label = None if caption else usual_column(others, LABELS)
        if not captions and label is None:
            raise missing("caption_column", "no column of captions or labels found")
    columns = Columns(image, captions, label)
    for name in columns.all:
        if (count := list(found).count(name)) > 1:
            raise DataError(f"{where}: has {count} columns named {name!r}; rename all but one")
    return columns


def usual_column(found: Iterable[str], names: Iterable[str]) -> str | None:
    """The first of some usual names that is found, in any letter case."""
    usual = {name.lower(): name for name in reversed(list(found))}
    return next((usual[name] for name in names if name in usual), None)


def several_labels(column: str, where: str) -> DataError:
    """The error for a column of lists of labels."""
    return DataError(
        f"{where}: the column {column!r} has lists of labels; one label per image is read: name "
        f"such a column in data.label_column, or one of captions in data.caption_column"
    )


def _check_header(found: Sequence[str], where: str) -> None:
    """Refuse a header of values, or of names with another delimiter.

    Raises:
        DataError: none of the names is a usual one, and it looks like such a header.
    """
    names = [name.lower() for name in found]
    usual = {*IMAGES, *CAPTIONS, *LABELS}
    if not usual.isdisjoint(names):
        return
    if any(is_url(name) or Path(name).suffix in SUFFIXES for name in names):
        raise DataError(
            f"{where}: has no header line, but values in the first line ({', '.join(found)[:200]});"
            f" write the names of the columns above it, such as image and caption"
        )
    for sign in ";\t|: ":
        if any(not usual.isdisjoint(name.split(sign)) or name == f"sep={sign}" for name in names):
            advice = "format table reads such files" if sign in ";\t|" else "save it with commas"
            raise DataError(f"{where}: its columns are separated by {sign!r}; {advice}")


def class_names(
    config: DataConfig,
    where: str,
    names: Sequence[str] | None,
    values: Callable[[], Iterable[str]] | None,
) -> tuple[list[str], dict[str, int]]:
    """The names of the classes, and the label of each value in the data.

    Args:
        config: its `class_names` is a file of names, which takes precedence.
        where: the data set, for messages.
        names: by label, where the data has them.
        values: finds the distinct values in the data; None: not possible.

    Raises:
        DataError: no file, no names, or not as many as the data has classes.
    """
    if config.class_names is not None:
        given = read_class_file(Path(config.class_names))
        if names is None:
            return list(given.names), index_labels(given.names, given.keys)
        named = given.names_of(names, config.class_names)
        return named, index_labels(named)
    if names:
        named = [name.replace("_", " ") for name in names]
        return named, index_labels(named)
    if names is not None or values is None:
        raise DataError(f"{where}: its classes have no names; set data.class_names to a file")
    found = sorted_values(values())
    if not found:
        raise DataError(f"{where}: no row has a label")
    labels = {value: label for label, value in enumerate(found)}
    return [value.replace("_", " ") for value in found], labels


def sorted_values(values: Iterable[str]) -> list[str]:
    """Distinct values but empty ones; as numbers if all are whole numbers, else as text."""
    return sorted_names(set(values) - {""})


def check_count(values: Sized, column: str, where: str) -> None:
    """Check that the distinct values of a column can be classes.

    Raises:
        DataError: there are too many.
    """
    if len(values) > MAX_CLASSES:
        raise DataError(
            f"{where}: the label column {column!r} has over {MAX_CLASSES} distinct values; "
            f"if these are captions, name it in data.caption_column"
        )


class RowMapper:
    """Turns rows into samples.

    Args:
        config: for templates.
        columns: which are used.
        folder: paths of images are relative to it.
        classes: of class data: the names, and the label of each value.
    """

    def __init__(
        self,
        config: DataConfig,
        columns: Columns,
        folder: Path,
        classes: tuple[list[str], dict[str, int]] | None = None,
    ) -> None:
        self.columns, self.folder = columns, folder
        self.classes, self.labels = classes or ([], {})
        self.templates: Sequence[str] = ()
        if classes:
            self.templates = choose_templates(config.templates, folder / "templates.txt")

    def sample(self, name: str, row: Mapping[str, object]) -> Sample:
        """The sample of a row; `name` is for messages.

        Raises:
            SampleError: it has no image, no caption or no known label.
        """
        columns = self.columns
        image = self._image(name, row.get(columns.image))
        id_ = str(image) if isinstance(image, Path) else name
        if columns.label is None:
            values = [row.get(column) for column in columns.captions]
            return Sample(id_, image, _captions(name, values))
        value = row.get(columns.label)
        if isinstance(value, list | tuple | Mapping):
            raise SampleError("several labels", str(several_labels(columns.label, name)))
        label = find_label(value, self.labels, self.classes, name)
        return Sample(id_, image, fill(self.templates, self.classes[label]), label)

    def _image(self, name: str, value: object) -> Path | bytes:
        if isinstance(value, Mapping):  # Hugging Face's images
            value = value.get("bytes") or value.get("path")
        if isinstance(value, bytes) and value:
            return value
        if not value:
            raise SampleError("missing image", f"{name}: has no image")
        if not isinstance(value, str) or "\0" in value:
            raise SampleError("malformed row", f"{name}: its image is not a path")
        if is_url(value):
            raise SampleError("image at a URL", f"{name}: its image {value[:200]} {URL_IN_DATA}")
        if len(value) > MAX_PATH_LENGTH:
            raise SampleError(
                "malformed row",
                f"{name}: its image is a path of {len(value)} characters (base64 is not supported)",
            )
        return self.folder / value


class RowDataset(Dataset):
    """Rows by index as samples; a row's number in messages counts from 1.

    Args:
        rows: each a mapping from column to value.
        mapper: turns a row into a sample.
        where: the file or data set, for messages.
    """

    def __init__(self, rows: Any, mapper: RowMapper, where: str) -> None:
        self.rows, self.mapper, self.where = rows, mapper, where
        self.classes, self.templates = mapper.classes, mapper.templates

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Sample:
        name = self.name(index)
        try:
            row = self.rows[index]
        except UnicodeDecodeError:
            raise SampleError("caption not UTF-8", f"{name}: is not UTF-8 text") from None
        return self.mapper.sample(name, row)

    def name(self, index: int) -> str:
        """The data set and the row."""
        return f"{self.where} row {index + 1}"


def _captions(name: str, values: Iterable[object]) -> list[str]:
    """The non-empty texts of a row, whose values are texts or lists of texts."""
    captions = []
    for value in values:
        for text in value if isinstance(value, list | tuple) else [value]:
            if text is None or text != text:  # pandas writes a missing text as NaN
                continue
            if not isinstance(text, str):
                kind = type(text).__name__
                raise SampleError("malformed row", f"{name}: a caption is not text but {kind}")
            if text.strip():
                captions.append(text)
    if not captions:
        raise SampleError("empty caption", f"{name}: an empty caption")
    check_unicode(captions, name)
    return captions
