"""What can be had by name: published weights, and architectures to train from scratch."""

import difflib
from collections.abc import Iterator
from typing import NamedTuple

from leanclip.config.presets import PRESETS
from leanclip.config.published import Published, published

OPENAI = "OpenAI"


class Entry(NamedTuple):
    """A name for `load`, `--load` and `--model`, or for `arch` and a new model."""

    family: str
    name: str
    source: str  # a repository on the hub, OpenAI, or "" for an architecture alone


def catalogue(word: str = "") -> Iterator[Entry]:
    """Every name that contains a word, or whose family does; by family."""
    families: dict[str, list[Published]] = {}
    for one in published():
        families.setdefault(one.family, []).append(one)
    seen: set[str] = set()
    for family, models in families.items():
        names = {one.architecture: None for one in models}
        for preset in PRESETS:
            if preset.removesuffix("-quickgelu") in names and preset not in seen:
                seen.add(preset)
                yield from _matching(Entry(family, preset, ""), word)
        for one in models:
            source = one.repository or OPENAI
            yield from _matching(Entry(family, one.name, source), word)


def nearest_family(word: str) -> str:
    """`; did you mean x?` for the nearest family or name; may be empty."""
    by_lower = {text.lower(): text for entry in catalogue() for text in (entry.family, entry.name)}
    close = difflib.get_close_matches(word.lower(), by_lower, n=1)
    return f"; did you mean {by_lower[close[0]]}?" if close else ""


def _matching(entry: Entry, word: str) -> Iterator[Entry]:
    if any(word.lower() in text.lower() for text in entry):
        yield entry
