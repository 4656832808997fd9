"""The training runs of a folder: what state they are in, and their figures, to be drawn.

A run is a folder with metrics.jsonl, up to three below. Its name is its path from the top, and is
only ever compared with the names that are there: no path is made from what a browser sends.
"""

import re
import time
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from leanclip.io.files import read_facts, read_metrics

DEPTH = 3
MOST_RUNS = 500
MOST_POINTS = 500  # of a curve
STALE = 120  # seconds without a word from a run that says it is running
NAMES = ("metrics.jsonl", "status.json", "config.yaml")

CURVES = OrderedDict(  # a metric's name, or how it begins -> what it is called on the page
    {
        "train/loss": "loss",
        "val/": "",
        "guard/": "",
        "train/lr": "learning rate",
        "train/logit_scale": "logit scale",
        "train/gradient_norm": "gradient norm",
        "train/samples_per_second": "images per second",
        "train/data_wait_share": "share of the time waiting for data",
    }
)


@dataclass(frozen=True)
class Run:
    """A run's folder."""

    name: str
    folder: Path

    def facts(self) -> dict[str, Any]:
        """What a list shows: its state, step of how many, when it last wrote, has it a report."""
        status = read_facts(self.folder / "status.json")
        changed = max((_changed(self.folder / name) for name in NAMES), default=0.0)
        state = str(status.get("state", "unknown"))
        if state == "running" and time.time() - changed > STALE:
            state = "silent"
        return {
            "name": self.name,
            "state": state,
            "step": _whole(status.get("step")),
            "steps": _whole(status.get("steps")),
            "changed": changed,
            "has_report": (self.folder / "report.html").is_file(),
        }

    def curves(self) -> list[dict[str, Any]]:
        """Its figures by step, thinned to MOST_POINTS each: name, steps, values."""
        found: dict[str, tuple[list[int], list[float]]] = {}
        for line in read_metrics(self.folder):
            for name, value in line.items():
                if _label(name) is not None and _is_number(value):
                    steps, values = found.setdefault(name, ([], []))
                    steps.append(int(line["step"]))
                    values.append(float(value))
        order = sorted(found, key=lambda name: (_place(name), _natural(name)))
        return [
            {"name": name, "label": _label(name), "steps": steps, "values": values}
            for name in order
            for steps, values in [_thinned(*found[name])]
        ]


def runs_in(top: Path) -> list[Run]:
    """The runs below a folder, the one that was last written to first."""
    found = list(_below(top, top, DEPTH))
    found.sort(key=lambda run: -_changed(run.folder / "metrics.jsonl"))
    return found[:MOST_RUNS]


def _below(top: Path, folder: Path, depth: int) -> Iterator[Run]:
    if (folder / "metrics.jsonl").is_file():
        name = "." if folder == top else folder.relative_to(top).as_posix()
        yield Run(plain(name), folder)
        return
    if depth == 0:
        return
    try:
        inner = sorted(path for path in folder.iterdir() if path.is_dir() and not path.is_symlink())
    except OSError:
        return
    for path in inner:
        yield from _below(top, path, depth - 1)


def _label(name: str) -> str | None:
    """What a metric is called; None: it is not shown."""
    if name in CURVES:
        return CURVES[name]
    if name.startswith(("val/", "guard/")):
        part, _, rest = name.partition("/")
        words = rest.replace("_", " ").replace("zeroshot", "zero-shot")
        return words if part == "val" else f"guard: {words}"
    return None


def _place(name: str) -> int:
    names = list(CURVES)
    return names.index(name if name in CURVES else f"{name.partition('/')[0]}/")


def _natural(name: str) -> list[str]:
    """So that R@5 comes before R@10."""
    return [part.zfill(9) if part.isdecimal() else part for part in re.split(r"(\d+)", name)]


def _thinned(steps: list[int], values: list[float]) -> tuple[list[int], list[float]]:
    """At most MOST_POINTS: the mean of as many neighbours each; the last step stays the last."""
    size = -(-len(steps) // MOST_POINTS)
    if size <= 1:
        return steps, values
    starts = range(0, len(steps), size)
    means = [sum(part) / len(part) for i in starts for part in [values[i : i + size]]]
    return [steps[min(i + size, len(steps)) - 1] for i in starts], means


def _changed(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0


def _whole(value: Any) -> int | None:
    return int(value) if _is_number(value) else None


def _is_number(value: Any) -> bool:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return is_number and abs(value) < 1e308  # JSON has whole numbers that no float holds


def plain(name: str) -> str:
    """A name as JSON can have it, whatever bytes the file system has."""
    return name.encode("utf-8", "replace").decode()
