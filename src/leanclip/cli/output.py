"""Printed results: a table on a terminal; JSON lines in a pipe or a file, or with --json."""

import json
import sys
from collections.abc import Collection, Iterable, Sequence
from typing import TYPE_CHECKING, Any

from leanclip.errors import escaped

if TYPE_CHECKING:
    from rich.text import Text


def wants_json(as_json: bool = False) -> bool:
    """Whether to print JSON lines."""
    return as_json or not sys.stdout.isatty()


def print_json(record: dict[str, Any]) -> None:
    """Print one line of JSON."""
    line = json.dumps(record, ensure_ascii=False)
    try:
        line.encode()
    except UnicodeEncodeError:  # a file name that is not UTF-8
        line = json.dumps(record)
    print(line, flush=True)


def print_table(
    headings: Sequence[str],
    rows: "Iterable[Sequence[str | Text]]",
    *,
    numbers: Collection[int] = (),
) -> None:
    """Print a table; the columns `numbers` are right-aligned."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table()
    for i, heading in enumerate(headings):
        side = "right" if i in numbers else "left"
        table.add_column(Text(heading, overflow="fold"), justify=side, overflow="fold")
    for row in rows:
        # A Text, as brackets in a str would be markup.
        table.add_row(*(Text(escaped(cell)) if isinstance(cell, str) else cell for cell in row))
    Console().print(table)
