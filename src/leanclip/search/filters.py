"""Which images of an index to search: by label, folder, size and date of the files."""

import os
import re
from collections.abc import Sequence
from datetime import datetime, timedelta
from pathlib import Path
from typing import TypedDict, Unpack

from leanclip.data.dataset import readable
from leanclip.errors import ConfigError

Time = datetime | float  # local if it has no zone; or seconds since 1970


class Filters(TypedDict, total=False):
    """Which images to search; `None` does not restrict."""

    label: str | Sequence[str] | None  # one of these labels
    folder: str | Path | None  # files in this folder or below it
    size: tuple[float | None, float | None] | None  # bytes: minimum, and an exclusive maximum
    date: tuple[Time | None, Time | None] | None  # earliest, and an exclusive latest


def condition(**filters: Unpack[Filters]) -> tuple[str, list[object]]:
    """The filters as an SQL condition, and its parameters."""
    parts: list[str] = ["1"]
    values: list[object] = []
    if label := filters.get("label"):
        labels = [label] if isinstance(label, str) else label
        parts.append(f"label IN ({', '.join('?' * len(labels))})")
        values += map(readable, labels)
    if (folder := filters.get("folder")) is not None:
        prefix = os.fsencode(absolute(folder)).rstrip(b"/")  # of the root: nothing
        parts.append("path > ? AND path < ?")  # "0" is the character after "/"
        values += [prefix + b"/", prefix + b"0"]
    ranges = (("size", filters.get("size"), 1), ("mtime", filters.get("date"), 10**9))
    for column, limits, factor in ranges:
        for operator, limit in zip((">=", "<"), limits or (None, None), strict=True):
            if limit is not None:
                number = limit.timestamp() if isinstance(limit, datetime) else limit
                parts.append(f"{column} {operator} ?")
                values.append(round(number * factor))
    return " AND ".join(parts), values


def absolute(path: str | Path) -> str:
    """An absolute path, normalised; symbolic links stay."""
    return os.path.normpath(Path(path).absolute())


def size_range(text: str) -> tuple[float | None, float | None]:
    """ "100k..2M" -> (100000, 2000000), in bytes; either end may be missing.

    Raises:
        ConfigError: it is not of that form.
    """
    ends = re.fullmatch(r"(?:(\d+(?:\.\d+)?)([kMG]?))?\.\.(?:(\d+(?:\.\d+)?)([kMG]?))?", text)
    if not ends:
        raise ConfigError(f"--size {text}: use 100k..2M, ..2M or 100k.. (bytes, k, M, G)")
    units = {"": 1, "k": 10**3, "M": 10**6, "G": 10**9}
    low, low_unit, high, high_unit = ends.groups()
    return (
        float(low) * units[low_unit] if low else None,
        float(high) * units[high_unit] if high else None,
    )


def date_range(text: str) -> tuple[datetime | None, datetime | None]:
    """ "2024-05..2024-06-15" -> the start of 1 May to the end of 15 June, in local time.

    A year, month or day alone stands for all of it; either end may be missing.

    Raises:
        ConfigError: it is not of that form.
    """
    first, dots, last = text.partition("..")
    last = last if dots else first
    try:
        return (_period(first)[0] if first else None, _period(last)[1] if last else None)
    except ValueError:
        raise ConfigError(
            f"--date {text}: use 2024-05-31, 2024-05..2024-06-15, 2023.. or ..2023"
        ) from None


def _period(text: str) -> tuple[datetime, datetime]:
    """The start of a year, month or day, and that of the next one."""
    for form, days in (("%Y", 366), ("%Y-%m", 31), ("%Y-%m-%d", 1)):
        if form.count("-") == text.count("-"):
            start = datetime.strptime(text, form)
            later = start + timedelta(days=days)
            return start, datetime.strptime(later.strftime(form), form)
    raise ValueError(text)
