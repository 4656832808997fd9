"""Which pictures of an index count: by label, folder, size and date, as a condition in SQL."""

import os
from collections.abc import Sequence
from datetime import date, datetime
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
