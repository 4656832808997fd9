"""What every layout gives: a data set of samples, each an image with its captions.

A layout is a file beside this one with `open_dataset(config) -> Dataset`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from leanclip.errors import DataError


@dataclass(frozen=True)
class Sample:
    """One image, not yet read, with every caption that fits it."""

    id: str  # names the sample in messages: its path
    image: Path | bytes
    captions: Sequence[str]
    label: int | None = None  # index into the data set's classes


@dataclass(frozen=True)
class Dataset:
    """A list of samples; class data has names of classes and templates for captions."""

    paths: Sequence[Path]
    captions: Sequence[Sequence[str]] = ()  # of each sample; class data has none of its own
    labels: Sequence[int] = ()
    classes: Sequence[str] = ()
    templates: Sequence[str] = ()
    about: str = ""  # what sets this data apart, for the words of a report

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Sample:
        path = self.paths[index]
        if not self.classes:
            return Sample(str(path), path, self.captions[index])
        label = self.labels[index]
        return Sample(str(path), path, fill(self.templates, self.classes[label]), label)


def fill(templates: Sequence[str], name: str) -> list[str]:
    """The templates with `{}` replaced by a class name."""
    return [template.replace("{}", name) for template in templates]


def check_templates(templates: Sequence[str], *, where: str) -> Sequence[str]:
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
        DataError: the file is missing or not UTF-8.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise DataError(f"{path}: no such file") from None
    except UnicodeDecodeError:
        raise DataError(f"{path}: is not UTF-8 text") from None
    return [line.strip() for line in text.splitlines() if line.strip()]
