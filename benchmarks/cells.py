"""Figures from records as cells of Markdown; what is missing is "not measured"."""

from collections.abc import Iterable, Sequence
from typing import Any

Records = list[dict[str, Any]]
NOT_MEASURED = "not measured"


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> list[str]:
    """Lines of a Markdown table."""
    lines = ["| " + " | ".join(head) + " |", "| " + " | ".join("---" for _ in head) + " |"]
    return [*lines, *("| " + " | ".join(map(str, row)) + " |" for row in rows)]


def found(values: Any, *keys: str) -> Any:
    """What is under the keys; None where one is missing."""
    for key in keys:
        if not isinstance(values, dict) or key not in values:
            return None
        values = values[key]
    return values


def number(value: Any, times: float = 1, form: str = "") -> str:
    """A figure of three digits, or of a form; "not measured" in place of None."""
    if value is None:
        return NOT_MEASURED
    if isinstance(value, dict):  # median, least, greatest
        if "median" not in value:
            return NOT_MEASURED
        middle = number(value["median"], times, form)
        if value.get("least") in (None, value["median"]) and not value.get("greatest"):
            return middle
        least, greatest = (number(value.get(key), times, form) for key in ("least", "greatest"))
        return f"{middle} ({least}–{greatest})"
    if isinstance(value, str | bool):
        return str(value)
    value *= times
    if form:
        return format(value, form)
    if abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.3g}"


def show(values: Any, *keys: str, times: float = 1, form: str = "") -> str:
    return number(found(values, *keys), times, form)


def merged(records: Records) -> dict[str, Any]:
    """The results of all records, the later ones over the earlier."""
    return {key: value for record in records for key, value in record["results"].items()}


def listed(values: Any, before: str = "") -> list[list[str]]:
    """A row for each figure under its name."""
    return [[f"{before}{name}", number(value)] for name, value in (values or {}).items()]
