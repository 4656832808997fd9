"""The findings of `leanclip data check` in words: what is over the thresholds, and a summary."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment

NEAR_LEAKAGE = 0.01  # default fraction of a split's images with near-duplicates in another


def problems(
    values: Mapping[str, Any], *, max_problems: float = 0.01, max_leakage: float | None = None
) -> list[str]:
    """What is over the thresholds, one per line.

    Args:
        values: of `leanclip.data.tools.findings`.
        max_problems: the fraction of unusable samples that is allowed.
        max_leakage: the fraction of a split's images that may be in another one, exactly or
            nearly; None: no exact copies, and NEAR_LEAKAGE near-duplicates.
    """
    lines = []
    for name, part in values["parts"].items():
        if part["unusable_fraction"] > max_problems:
            count = sum(part["unusable"].values())
            lines.append(
                f"{name}: {count:,} of {part['samples']:,} samples "
                f"({part['unusable_fraction']:.1%}) are unusable; "
                f"the limit is {max_problems:.1%} (--max-problems)"
            )
    limits = (0.0, NEAR_LEAKAGE) if max_leakage is None else (max_leakage, max_leakage)
    for one in values["duplicates"]["across"]:
        for kind, limit in zip(("exact", "near"), limits, strict=True):
            if one[f"{kind}_fraction"] > limit:
                copies = {"exact": "exact copies", "near": "near-duplicates"}[kind]
                lines.append(
                    f"{' and '.join(one['parts'])}: {one[kind]:,} {copies} "
                    f"({one[f'{kind}_fraction']:.1%}); the limit is {limit:.1%} (--max-leakage)"
                )
    return lines


def check_text(values: Mapping[str, Any], problems: Sequence[str]) -> str:
    """The whole summary, the problems last."""
    environment = Environment(trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"count": "{:,}".format, "percent": "{:.1%}".format, "counts": _counts}
    template = Path(__file__).with_name("templates") / "check.txt"
    text = environment.from_string(template.read_text("utf-8")).render(values, problems=problems)
    return text.rstrip("\n")


def _counts(numbers: Mapping[str, int]) -> str:
    return ", ".join(f"{number:,} {name}" for name, number in numbers.items())
