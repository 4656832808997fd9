"""What every layout gives: a data set of samples, each an image with its captions.

A layout is a file beside this one with `open_dataset(config) -> Dataset`. A data set is copied
into every process that reads it, so it keeps no Python object per sample.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import overload

import numpy as np

from leanclip.data.order import shuffled
from leanclip.data.prompts import TEMPLATES
from leanclip.errors import DataError, SampleError, is_shortage
from leanclip.io.files import split_lines


@dataclass(frozen=True)
class Sample:
    """One image, not yet decoded, with every caption that fits it."""

    id: str  # names the sample in messages: its path
    image: Path | bytes
    captions: Sequence[str]
    label: int | None = None  # index into the data set's classes
    source: int = 0  # which one of a mixture it is from
    error: SampleError | None = None  # why it cannot be used: in a stream it keeps its place


class Dataset(ABC):
    """Samples by index; class data has names of classes, and templates for captions.

    Attributes:
        classes: names, by label; empty where the samples have captions of their own.
        templates: captions of class data, with `{}` for the name.
        about: what sets this data apart, for the words of a report.
        is_stream: some samples cannot be had by index, only as `visits` gives them.
    """

    classes: Sequence[str] = ()
    templates: Sequence[str] = ()
    about: str = ""
    is_stream: bool = False

    @abstractmethod
    def __len__(self) -> int:
        """How many samples an epoch has."""

    @abstractmethod
    def __getitem__(self, index: int) -> Sample:
        """A sample, its image not yet decoded.

        Raises:
            SampleError: this one cannot be had.
        """

    @property
    def has_random_access(self) -> bool:
        """Whether samples far from each other are read as fast as neighbours."""
        return True

    @property
    def distinct(self) -> int:
        """How many different samples there are, whatever the size of an epoch."""
        return len(self)

    def name(self, index: int) -> str:
        """What a sample is called in messages, where it can be told without reading it."""
        return f"sample {index}"

    def remarks(self) -> list[str]:
        """What is odd about all of it, though it is no fault of one sample; a line each."""
        return []

    def visits(self, key: Sequence[int], start: int = 0) -> Iterator["int | Sample"]:
        """What an epoch visits, in an order drawn by `key`, from position `start` of it.

        Indices; samples themselves where a data set has no access by index.
        """
        return shuffled(len(self), key, start)


class ImageFiles(Dataset):
    """Class data in files."""

    def __init__(
        self,
        paths: Iterable[Path],
        labels: Sequence[int],
        classes: Sequence[str],
        templates: Sequence[str],
    ) -> None:
        self.paths = Strings(str(path) for path in paths)
        self.labels = np.array(labels, np.int32)
        self.classes, self.templates = classes, templates

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Sample:
        path, label = self.paths[index], int(self.labels[index])
        return Sample(path, Path(path), fill(self.templates, self.classes[label]), label)

    def name(self, index: int) -> str:
        """The path."""
        return self.paths[index]


class Strings(Sequence[str]):
    """A list of strings in two arrays: processes share them, and no string is an object."""

    def __init__(self, texts: Iterable[str]) -> None:
        encoded = [text.encode("utf-8", "surrogateescape") for text in texts]
        self._ends = np.cumsum([0, *map(len, encoded)])
        self._bytes = np.frombuffer(b"".join(encoded), np.uint8)

    def __len__(self) -> int:
        return len(self._ends) - 1

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not 0 <= index < len(self):
            raise IndexError(index)
        first, last = self._ends[index : index + 2]
        return self._bytes[first:last].tobytes().decode("utf-8", "surrogateescape")


def fill(templates: Sequence[str], name: str) -> list[str]:
    """The templates with `{}` replaced by a class name."""
    return [template.replace("{}", name) for template in templates]


def choose_templates(given: Sequence[str] | None, path: Path) -> Sequence[str]:
    """The templates of a config, else of a file if it is there, else the usual one.

    Raises:
        DataError: there are none, or one lacks `{}`.
    """
    if given is not None:
        return check_templates(given)
    return read_templates(path) if path.is_file() else TEMPLATES


def check_templates(templates: Sequence[str], *, where: str = "data.templates") -> Sequence[str]:
    """The templates, each of which must have a place for the name.

    Raises:
        DataError: there are none, or one lacks `{}`.
    """
    if not templates:
        raise DataError(f"{where}: no templates; write one a line, with {{}} for the name")
    for template in templates:
        if "{}" not in template:
            raise DataError(f"{where}: the template {template!r} has no {{}} for the name")
    return templates


def check_unicode(captions: Sequence[str], name: str) -> None:
    """That captions, which JSON may spoil, are whole characters.

    Raises:
        SampleError: half a surrogate pair is in one.
    """
    try:
        "".join(captions).encode()
    except UnicodeEncodeError:
        raise SampleError("caption not UTF-8", f"{name}: half a character in a caption") from None


def split_folder(root: str, split: str | None) -> Path:
    """The folder of a split: root/split, or root itself without one.

    Raises:
        DataError: it does not exist.
    """
    folder = Path(root)
    if not folder.is_dir():
        raise DataError(f"data.root: no such folder: {root}")
    if split is None:
        return folder
    if not (folder / split).is_dir():
        found = ", ".join(sorted(path.name for path in folder.iterdir() if path.is_dir())[:8])
        raise DataError(f"data.split: no folder {split} in {root} (found: {found or 'no folders'})")
    return folder / split


def read_lines(path: Path) -> list[str]:
    """The lines of a UTF-8 text file, stripped, without empty ones.

    Raises:
        SampleError: the file is missing or not UTF-8.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise SampleError("missing file", f"{path}: no such file") from None
    except OSError as error:
        if is_shortage(error):
            raise
        raise SampleError("unreadable file", f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise SampleError("caption not UTF-8", f"{path}: is not UTF-8 text") from None
    return [line.strip() for line in split_lines(text) if line.strip()]


def read_class_names(path: Path, *, option: str = "data.class_names") -> list[str]:
    """A class's name a line, by label: `class_names_in` of a file.

    Raises:
        DataError: there is no such file, it cannot be read, or does not hold such lines.
    """
    return class_names_in(_content(path, option), where=str(path))


def read_templates(path: Path, *, option: str = "data.templates") -> list[str]:
    """A template a line: `templates_in` of a file.

    Raises:
        DataError: there is no such file, it cannot be read, or does not hold such lines.
    """
    return templates_in(_content(path, option), where=str(path))


def _content(path: Path, option: str) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise DataError(f"{option}: no such file: {path}") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from None


def templates_in(content: bytes, *, where: str) -> list[str]:
    """The lines of a file of templates, without blank ones; `{c}` is taken for `{}`.

    Raises:
        DataError: there are none, one lacks `{}`, or it is not UTF-8.
    """
    lines = [line for line in _lines_in(content, where) if line]
    lines = [line if "{}" in line else line.replace("{c}", "{}") for line in lines]
    check_templates(lines, where=where)
    return lines


def class_names_in(content: bytes, *, where: str) -> list[str]:
    """The lines of a file of class names, stripped; the number of a line is its label.

    Raises:
        DataError: it is empty, not UTF-8, or has a blank line before others.
    """
    lines = _lines_in(content, where)
    while lines and not lines[-1]:
        lines.pop()
    if not lines:
        raise DataError(f"{where}: is empty; write a class's name a line, in the order of labels")
    if "" in lines:
        raise DataError(
            f"{where}: line {lines.index('') + 1} is blank, and a line's number is its label; "
            f"write a name there, or remove the line"
        )
    return lines


def _lines_in(content: bytes, where: str) -> list[str]:
    """The lines of a text, stripped."""
    try:
        return [line.strip() for line in split_lines(content.decode("utf-8-sig"))]
    except UnicodeDecodeError:
        raise DataError(f"{where}: is not UTF-8 text") from None
