"""Samples that cannot be used: named once, counted by kind, and fatal when there are too many."""

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from leanclip.errors import DataError, SampleError
from leanclip.io.files import read_json_lines

LONGEST = 300  # characters of an id or a reason


class Bad(NamedTuple):
    """One sample that was skipped."""

    id: str
    kind: str  # a few words, the same for the same fault
    reason: str  # one line that names the sample

    @classmethod
    def of(cls, name: str, error: SampleError) -> "Bad":
        """What an error says of the sample called `name`."""
        reason = " ".join(str(error).split())
        reason = reason if name in reason else f"{name}: {reason}"
        return cls(short_id(name), error.kind, short_id(reason))


def short_id(text: str) -> str:
    """At most LONGEST characters, of the start and the end."""
    half = LONGEST // 2
    return text if len(text) <= LONGEST else f"{text[: half - 1]}…{text[-half:]}"


class SkipTracker:
    """The samples of a data set that were skipped, over all ranks, and the limit on them.

    A sample counts once, by its id. What ranks have skipped is brought together by the caller.

    Args:
        dataset_size: of how many samples.
        max_share: the fraction of them that may be skipped; one more raises an error.
        path: a file of JSON lines to add each to; what it holds was skipped before.
        must_write: whether to add to that file; of several ranks one does.
        option: the setting that is `max_share`, for the error message.
    """

    def __init__(
        self,
        dataset_size: int,
        max_share: float,
        path: Path | None = None,
        *,
        must_write: bool = True,
        option: str = "data.max_bad_fraction",
    ) -> None:
        self.option = option
        self.size, self.share, self.path = dataset_size, max_share, path
        self.must_write = must_write
        lines = read_json_lines(path) if path else []
        self.found = {facts["id"]: facts["kind"] for facts in lines}

    def add(self, bad: Sequence[Bad]) -> list[str]:
        """Note skipped samples; gives the reasons of those not seen before.

        Raises:
            DataError: more than the allowed share of the data set was skipped.
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
                f"{self.summary()}; over {self.option}={self.share:g}; mend them or raise "
                f"the share{where})"
            )
        return [one.reason for one in new]

    def is_over(self, count: int) -> bool:
        """Whether so many are more than the limit."""
        return count > self.share * self.size

    def summary(self) -> str:
        """Counts by kind: "2 missing file, 1 damaged image"."""
        counts = Counter(self.found.values())
        return ", ".join(f"{count} {kind}" for kind, count in counts.most_common())
