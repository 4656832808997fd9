"""Images and texts as words of the command line: names, files of lines, or - for standard input."""

import os
import re
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from leanclip.errors import ConfigError, DataError

if TYPE_CHECKING:
    from leanclip.preprocess.decoding import Source


def check_stdin(words: Sequence[str]) -> None:
    """Raise a ConfigError if `-` is given more than once."""
    if list(words).count("-") > 1:
        raise ConfigError("-: standard input can be read only once")


def images_of(words: Iterable[str]) -> "tuple[list[Source], list[str]]":
    """The images that are named, and their names. URLs are fetched, folders expanded."""
    from leanclip.inference.inputs import expand_inputs, to_source

    sources, names = [], []
    for word in words:
        given = images_in(sys.stdin.buffer.read()) if word == "-" else expand_inputs([word]).sources
        for image in given:
            sources.append(to_source(image))
            names.append("-" if isinstance(image, bytes) else str(image))
    return sources, names


def images_in(content: bytes) -> "list[Source]":
    """Standard input: an image, or one path per line.

    Raises:
        DataError: a line is a URL.
    """
    from leanclip.io.files import URL_IN_DATA, is_lfs_pointer, is_url
    from leanclip.preprocess.decoding import is_image

    if is_image(content) or b"\0" in content or is_lfs_pointer(content):
        return [content]
    paths = paths_in(content)
    if url := next(filter(is_url, paths), None):
        raise DataError(f"standard input: {url[:200]} {URL_IN_DATA}, or name it as an argument")
    return list(paths)


def paths_in(content: bytes) -> list[str]:
    """Paths, one per line, in the encoding of the file system."""
    return [os.fsdecode(line) for line in re.split(rb"\r\n|\r|\n", content) if line.strip()]


def texts_of(word: str) -> list[str]:
    """The lines of standard input or of a file, or the word itself as the only text.

    Raises:
        DataError: standard input or the file is not UTF-8.
    """
    from leanclip.data.dataset import read_lines
    from leanclip.io.files import split_lines

    if word == "-":
        try:
            text = sys.stdin.buffer.read().decode("utf-8-sig")
        except UnicodeDecodeError:
            raise DataError("standard input is not UTF-8 text") from None
        return [line.strip() for line in split_lines(text) if line.strip()]
    return read_lines(Path(word)) if is_file(word) else [word]


def labels_of(word: str) -> list[str]:
    """Labels separated by commas, or the lines of standard input or of a file."""
    from leanclip.inference.classifier import read_labels

    if word == "-":
        return texts_of(word)
    return read_labels(word) if is_file(word) else word.split(",")


def is_file(word: str) -> bool:
    """Whether a word names a file."""
    try:
        return Path(word).is_file()
    except (OSError, ValueError):  # a sentence may be too long for a file name
        return False
