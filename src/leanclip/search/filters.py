"""Which pictures of an index count: by label, folder, size and date, as a condition in SQL."""

import os
import re
from collections.abc import Sequence
from datetime import date, datetime, timedelta
from pathlib import Path
from typing import Any

from leanclip.data.dataset import readable
from leanclip.errors import ConfigError

Range = tuple[Any, Any]  # from, and below; None: no limit


def conditions(
    *,
    label: str | Sequence[str] | None = None,
    folder: str | Path | None = None,
    size: Range | None = None,
    date: Range | None = None,
) -> tuple[str, list[object]]:
    """A condition on an item and its values; without values all count. See `Index.search_many`.

    Raises:
        ConfigError: a range is none.
    """
    parts: list[str] = []
    values: list[object] = []
    if label:
        labels = [label] if isinstance(label, str) else list(label)
        parts.append(f"label IN ({', '.join('?' * len(labels))})")
        values += map(readable, labels)
    if folder is not None:
        # A path below another begins with it and a slash; "0" comes after "/".
        words = [os.fsencode(absolute(folder)), os.fsencode(os.path.normpath(folder))]
        parts.append("((path > ? AND path < ?) OR below = ? OR (below > ? AND below < ?))")
        values += [words[0] + b"/", words[0] + b"0"]
        values += [words[1], words[1] + b"/", words[1] + b"0"]
    for name, given, factor in (("size", size, 1), ("mtime", date, 10**9)):
        for sign, limit in zip((">=", "<"), _pair(name, given), strict=True):
            if limit is not None:
                parts.append(f"{name} {sign} ?")
                values.append(round(_number(limit) * factor))
    return " AND ".join(parts) or "1", values


def absolute(path: str | Path) -> str:
    """A path from the root on; links in it stay."""
    return os.path.normpath(Path(path).absolute())


def _pair(name: str, given: Range | None) -> Range:
    pair = (None, None) if given is None else tuple(given)
    if len(pair) != 2:
        raise ConfigError(f"{name}: should be two values, from and below, found {given}")
    return pair


def _number(limit: object) -> float:
    """A number, or the seconds since 1970 of a date, which is local where it names no zone."""
    if isinstance(limit, date) and not isinstance(limit, datetime):
        limit = datetime(limit.year, limit.month, limit.day)
    return limit.timestamp() if isinstance(limit, datetime) else float(limit)  # pyright: ignore[reportArgumentType]


def size_range(text: str) -> Range:
    """ "100k..2M" -> (100000, 2000000), in bytes; either end may be missing.

    Raises:
        ConfigError: it is not of that form.
    """
    ends = re.fullmatch(r"(?:([\d.]+)([kMG]?))?\.\.(?:([\d.]+)([kMG]?))?", text)
    if not ends:
        raise ConfigError(f"--size {text}: use 100k..2M, ..2M or 100k.. (bytes, k, M, G)")
    units = {"": 1, "k": 10**3, "M": 10**6, "G": 10**9}
    low, low_unit, high, high_unit = ends.groups()
    return (
        float(low) * units[low_unit] if low else None,
        float(high) * units[high_unit] if high else None,
    )


def date_range(text: str) -> Range:
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
