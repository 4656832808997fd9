"""The interface of every format: a data set of samples, each an image with its captions.

A format is a file in `formats/` with `open_dataset(config) -> Dataset`. Data workers are forked, so
a data set keeps no Python object per sample: counting references would copy its memory.
"""

import os
import re
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, overload

import numpy as np

from leanclip.data.order import shuffled
from leanclip.data.prompts import TEMPLATES
from leanclip.errors import DataError, SampleError, is_shortage
from leanclip.io.files import LFS_POINTER, is_lfs_pointer, split_lines

_WHOLE_NUMBER = re.compile("-?[0-9]{1,300}")
_SYNSET = re.compile(r"(n[0-9]{8})\s+(.+)")  # a line of ImageNet's synset_mapping.txt


@dataclass(frozen=True)
class Sample:
    """One image, not yet decoded, with all of its captions."""

    id: str  # for messages, such as its path
    image: Path | bytes
    captions: Sequence[str]
    label: int | None = None  # index into the data set's classes
    source: int = 0  # index in a mixture
    error: SampleError | None = None  # why it cannot be used, in a stream


class Dataset(ABC):
    """Samples by index; class data has class names, and templates for captions.

    Attributes:
        classes: names, by label; empty if the samples have captions of their own.
        templates: captions of class data, with `{}` for the name.
        about: an adjective for its classes in a report, such as "unseen".
        is_stream: some samples have no index, and come from `visits` only.
    """

    classes: Sequence[str] = ()
    templates: Sequence[str] = ()
    about: str = ""
    is_stream: bool = False

    @abstractmethod
    def __len__(self) -> int:
        """Samples per epoch."""

    @abstractmethod
    def __getitem__(self, index: int) -> Sample:
        """A sample, its image not yet decoded.

        Raises:
            SampleError: it cannot be read.
        """

    @property
    def has_random_access(self) -> bool:
        """Whether samples in random order are read as fast as in sequence."""
        return True

    @property
    def distinct(self) -> int:
        """Number of different samples, whatever the size of an epoch."""
        return len(self)

    def name(self, index: int) -> str:
        """A sample's name for messages, without reading the sample."""
        return f"sample {index}"

    def data_warnings(self) -> list[str]:
        """Warnings about the data set as a whole, one line each."""
        return []

    def visits(self, key: Sequence[int], start: int = 0) -> Iterator["int | Sample"]:
        """The order of an epoch, drawn by `key`, from position `start`.

        Indices; or samples, of a data set without access by index.
        """
        return shuffled(len(self), key, start)


class ImageFiles(Dataset):
    """Class data in image files."""

    def __init__(
        self,
        paths: Iterable[Path],
        labels: Sequence[int],
        classes: Sequence[str],
        templates: Sequence[str],
    ) -> None:
        self.paths = StringArray(str(path) for path in paths)
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


class StringArray(Sequence[str]):
    """A list of strings in two arrays, which forked processes share."""

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
        text = self._bytes[self._ends[index] : self._ends[index + 1]].tobytes()
        return text.decode("utf-8", "surrogateescape")


def fill(templates: Sequence[str], name: str) -> list[str]:
    """The templates with `{}` replaced by a class name."""
    return [template.replace("{}", name) for template in templates]


def choose_templates(given: Sequence[str] | None, path: Path) -> Sequence[str]:
    """The given templates, else those of a file if it exists, else the default one.

    Raises:
        DataError: there are none, or one lacks `{}`.
    """
    if given is not None:
        return check_templates(given)
    return read_templates(path) if path.is_file() else TEMPLATES


def check_templates(templates: Sequence[str], *, where: str = "data.templates") -> Sequence[str]:
    """The templates, each of which must have `{}` for the name.

    Raises:
        DataError: there are none, or one lacks `{}`.
    """
    if not templates:
        raise DataError(f"{where}: no templates; write one per line, with {{}} for the name")
    for template in templates:
        if "{}" not in template:
            raise DataError(f"{where}: the template {template!r} has no {{}} for the name")
    return templates


def check_unicode(captions: Sequence[str], name: str) -> None:
    """Check for unpaired surrogates, which JSON allows.

    Raises:
        SampleError: a caption has one.
    """
    try:
        "".join(captions).encode()
    except UnicodeEncodeError:
        raise SampleError(
            "caption not UTF-8", f"{name}: an unpaired surrogate in a caption"
        ) from None


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
    """The lines of a UTF-8 text file, stripped, without blank ones.

    Raises:
        SampleError: the file is missing or not UTF-8.
    """
    try:
        content = path.read_bytes()
        if is_lfs_pointer(content):
            raise SampleError("git-lfs pointer", f"{path}: {LFS_POINTER}")
        text = content.decode("utf-8-sig")
    except FileNotFoundError:
        raise SampleError("missing file", f"{path}: no such file") from None
    except OSError as error:
        if is_shortage(error):
            raise
        raise SampleError("unreadable file", f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise SampleError("caption not UTF-8", f"{path}: is not UTF-8 text") from None
    return [line.strip() for line in split_lines(text) if line.strip()]


class ClassFile(NamedTuple):
    """The content of a file of class names."""

    names: Sequence[str]  # by line
    keys: Sequence[str]  # folder or label of each name; empty: a line's number is its label

    def names_of(self, keys: Sequence[str], where: str) -> list[str]:
        """A name for each of these folders or labels: by key, else in their order.

        Keys missing in the file become names, with spaces for underscores.

        Raises:
            DataError: a key of the file is unknown, or the number of names differs.
        """
        if self.keys:
            known = set(keys)
            unknown = [key for key in self.keys if key not in known]
            # A file of ImageNet's synsets may have more than the data.
            if unknown and not all(re.fullmatch("n[0-9]{8}", key) for key in self.keys):
                raise DataError(
                    f"{where}: names the class {unknown[0]!r}, which has no folder or label "
                    f"(found: {', '.join(keys[:4])}); remove the line, or add an empty folder"
                )
            named = dict(zip(self.keys, self.names, strict=True))
            return [named.get(key, key.replace("_", " ")) for key in keys]
        if len(self.names) != len(keys):
            raise DataError(
                f"{where}: has {len(self.names)} names for {len(keys)} classes; write one per line "
                f"in their order ({', '.join(keys[:4])}, ...), or each after its folder and a tab"
            )
        if list(keys) != sorted(set(keys)):  # an order of their own
            return list(self.names)
        # The keys may be numbers in alphabetical order (10 before 9), the names in numerical order.
        place = {key: index for index, key in enumerate(sorted_names(keys))}
        return [self.names[place[key]] for key in keys]


def sorted_names(names: Iterable[str]) -> list[str]:
    """Distinct names, in numerical order if all are whole numbers; else in alphabetical order."""
    distinct = sorted(set(names))
    is_numeric = all(map(_WHOLE_NUMBER.fullmatch, distinct))
    return sorted(distinct, key=int) if is_numeric else distinct


def index_labels(names: Sequence[str], keys: Sequence[str] = ()) -> dict[str, int]:
    """The class index of each value that a label may have, by the value's text.

    A whole number is an index from 0, whatever the names look like, unless a file of names has
    keys that are numbers; other values are keys, or names, also with underscores for spaces. A
    name shared by two classes is not a value.
    """
    by_key = {key: index for index, key in enumerate(keys)}
    times = Counter(names)
    by_name = {name: index for index, name in enumerate(names) if times[name] == 1}
    by_name = {name.replace(" ", "_"): index for name, index in by_name.items()} | by_name
    if any(map(_WHOLE_NUMBER.fullmatch, keys)):
        return by_name | by_key
    indices = {str(index): index for index in range(len(names))}
    if any(indices.get(name, index) != index for name, index in by_name.items()):
        # A name looks like the index of another class: then no number is a name.
        by_name = {n: index for n, index in by_name.items() if not _WHOLE_NUMBER.fullmatch(n)}
    return by_name | by_key | indices


def find_label(value: object, labels: Mapping[str, int], classes: Sequence[str], name: str) -> int:
    """The class index of a sample's label; `labels` as `index_labels` returns them.

    Raises:
        SampleError: the label is unknown, or the name of several classes.
    """
    text = "" if value is None else str(value)
    if isinstance(value, bool) and text not in labels:
        text = str(int(value))
    whole = text.removesuffix(".0")  # pandas writes 7.0 in a column with missing values
    if (label := labels.get(text, labels.get(whole))) is not None:
        return label
    why = "is no known class"
    if _WHOLE_NUMBER.fullmatch(text):
        why += f": the {len(classes)} classes are numbered from 0"
    elif text in classes:
        why = "is the name of several classes; give its number, from 0, as the label"
    elif isinstance(value, list | tuple):
        why = "is a list, and data of several classes per image is not read"
    raise SampleError("unknown class", f"{name}: {text[:60]!r} {why}")


def readable(name: str) -> str:
    """A file's name as text, decoded as UTF-8, or as Latin-1 if that fails."""
    try:
        return os.fsencode(name).decode()
    except UnicodeDecodeError:
        return os.fsencode(name).decode("latin-1")


def read_class_names(path: Path, *, option: str = "data.class_names") -> list[str]:
    """The names in a file of class names, by label; raises as `read_class_file`."""
    return list(read_class_file(path, option=option).names)


def read_class_file(path: Path, *, option: str = "data.class_names") -> ClassFile:
    """Read a file of class names; raises as `class_file_in`, or if it cannot be read."""
    return class_file_in(_content(path, option), where=str(path))


def read_templates(path: Path, *, option: str = "data.templates") -> list[str]:
    """Read a file of templates; raises as `templates_in`, or if it cannot be read."""
    return templates_in(_content(path, option), where=str(path))


def _content(path: Path, option: str) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise DataError(f"{option}: no such file: {path}") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from None


def templates_in(content: bytes, *, where: str) -> list[str]:
    """Templates, one per line, without blank lines; `{c}` is read as `{}`.

    Raises:
        DataError: there are none, one lacks `{}`, or it is not UTF-8.
    """
    lines = [line for line in _lines_in(content, where) if line]
    lines = [line if "{}" in line else line.replace("{c}", "{}") for line in lines]
    check_templates(lines, where=where)
    return lines


def class_file_in(content: bytes, *, where: str) -> ClassFile:
    """Class names: one `name`, `key<TAB>name` or ImageNet `n01440764 name, synonym` per line.

    The first of ImageNet's synonyms is the name. Without keys a line's number is its label.

    Raises:
        DataError: it is empty, not UTF-8, or has a blank line before others.
    """
    lines = _lines_in(content, where)
    while lines and not lines[-1]:
        lines.pop()
    if not lines:
        raise DataError(f"{where}: is empty; write one class name per line, in the order of labels")
    if "" in lines:
        raise DataError(
            f"{where}: line {lines.index('') + 1} is blank, and a line's number is its label; "
            f"write a name there, or remove the line"
        )
    pairs = [tuple(line.split("\t")) for line in lines]
    synsets = [found for line in lines if (found := _SYNSET.fullmatch(line))]
    if len(synsets) == len(lines):
        pairs = [(found[1], found[2].split(",")[0].strip()) for found in synsets]
    if not any(len(pair) > 1 for pair in pairs):
        return ClassFile(lines, [])
    for number, pair in enumerate(pairs, 1):
        if len(pair) != 2:
            raise DataError(
                f"{where}: line {number} is not a folder, a tab and a name, as others are: "
                f"{lines[number - 1][:80]!r}"
            )
    keys, names = ([part.strip() for part in column] for column in zip(*pairs, strict=True))
    if len(set(keys)) < len(keys):
        raise DataError(
            f"{where}: names {Counter(keys).most_common(1)[0][0]!r} twice; name each once"
        )
    return ClassFile(names, keys)


def _lines_in(content: bytes, where: str) -> list[str]:
    """The lines of a text, stripped."""
    if is_lfs_pointer(content):
        raise DataError(f"{where}: {LFS_POINTER}")
    try:
        return [line.strip() for line in split_lines(content.decode("utf-8-sig"))]
    except UnicodeDecodeError:
        raise DataError(f"{where}: is not UTF-8 text") from None
