"""Samples that cannot be used: logged once, counted by kind, an error if there are too many."""

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from leanclip.errors import DataError, SampleError
from leanclip.io.files import read_json_lines

MAX_LENGTH = 300  # characters of an id or a reason


class Bad(NamedTuple):
    """One sample that was skipped."""

    id: str
    kind: str  # a few words, equal for equal faults: "missing file"
    reason: str  # one line that names the sample

    @classmethod
    def of(cls, name: str, error: SampleError) -> "Bad":
        """From the error of the sample called `name`."""
        reason = " ".join(str(error).split())
        reason = reason if name in reason else f"{name}: {reason}"
        return cls(short_id(name), error.kind, short_id(reason))


def short_id(text: str) -> str:
    """At most MAX_LENGTH characters, from the start and the end."""
    half = MAX_LENGTH // 2
    return text if len(text) <= MAX_LENGTH else f"{text[: half - 1]}…{text[-half:]}"


class SkipTracker:
    """The skipped samples of a data set, over all ranks, and the limit on their number.

    A sample counts once, by its id. The caller gathers what the ranks have skipped.

    Args:
        dataset_size: number of samples.
        max_fraction: the fraction of them that may be skipped; one more is an error.
        path: a file of JSON lines to append to; those already there count.
        must_write: whether to append to that file: True on one of several ranks.
        option: the setting of `max_fraction`, for the error message.
    """

    def __init__(
        self,
        dataset_size: int,
        max_fraction: float,
        path: Path | None = None,
        *,
        must_write: bool = True,
        option: str = "data.max_bad_fraction",
    ) -> None:
        self.option = option
        self.size, self.max_fraction, self.path = dataset_size, max_fraction, path
        self.must_write = must_write
        lines = read_json_lines(path) if path else []
        self.found = {facts["id"]: facts["kind"] for facts in lines}

    def add(self, bad: Sequence[Bad]) -> list[str]:
        """Add skipped samples; returns the reasons of those not seen before.

        Raises:
            DataError: more than the allowed fraction of the data set was skipped.
        """
        new = list({one.id: one for one in bad if one.id not in self.found}.values())
        self.found |= {one.id: one.kind for one in new}
        if new and self.path is not None and self.must_write:
            with self.path.open("a", encoding="utf-8") as file:
                file.writelines(json.dumps(one._asdict()) + "\n" for one in new)
        if new and self.is_over(len(self.found)):
            where = f"; all are in {self.path}" if self.path else ""
            raise DataError(
                f"{new[-1].reason} (that makes {len(self.found)} bad of {self.size} samples: "
                f"{self.summary()}; over {self.option}={self.max_fraction:g}; repair them or raise "
                f"the limit{where})"
            )
        return [one.reason for one in new]

    def is_over(self, count: int) -> bool:
        """Whether this many skipped samples exceed the limit."""
        return count > self.max_fraction * self.size

    def summary(self) -> str:
        """Counts by kind: "2 missing file, 1 damaged image"."""
        counts = Counter(self.found.values())
        return ", ".join(f"{count} {kind}" for kind, count in counts.most_common())
