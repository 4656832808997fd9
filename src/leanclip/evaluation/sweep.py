"""A sweep between two models: metrics on a task and on a retention benchmark for every alpha.

    A, B, alphas -> weights in memory -> metrics of task and retention -> the chosen alpha

Images are decoded once for all alphas: one model takes each mixture's weights in turn.
"""

import logging
import math
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from leanclip.config.sections import to_plain
from leanclip.errors import ConfigError
from leanclip.evaluation import Task
from leanclip.evaluation.multi_model import evaluate_each
from leanclip.evaluation.retention import HEADLINES
from leanclip.model import CLIP
from leanclip.preprocess.images import Preprocess
from leanclip.weights import Weights, interpolate
from leanclip.weights.interpolate import between

log = logging.getLogger("leanclip")


@dataclass(frozen=True)
class Point:
    """The metrics of one mixture."""

    alpha: float
    task: dict[str, float]
    retention: dict[str, float]


@dataclass(frozen=True)
class Sweep:
    """All mixtures, by alpha, and which one was chosen by which rule."""

    points: list[Point]
    task: str  # the names of the metrics that the rule uses
    retention: str
    chosen: float
    rule: str

    def facts(self) -> dict[str, Any]:
        """What `sweep.json` holds."""
        return {
            "chosen": self.chosen,
            "rule": self.rule,
            "task": self.task,
            "retention": self.retention,
            "points": [vars(point) for point in self.points],
        }

    def table(self) -> str:
        """The metrics that the rule uses, one line per alpha."""
        lines = [f"alpha  task {self.task}  retention {self.retention}"]
        for point in self.points:
            mark = "  <- chosen" if point.alpha == self.chosen else ""
            lines.append(
                f"{point.alpha:<5g}  {point.task[self.task]:>{len(self.task) + 5}.1%}  "
                f"{point.retention[self.retention]:>{len(self.retention) + 6}.1%}{mark}"
            )
        return "\n".join([*lines, f"chosen: {self.chosen:g}, {self.rule}"])


def parse_alphas(words: str) -> list[float]:
    """`0,0.1,...,1` -> the numbers, rising, with 0 and 1, which are always measured.

    `...` stands for going on in the step of the two before it, up to the one after it.

    Raises:
        ConfigError: not numbers between 0 and 1, or `...` without two before and one after it.
    """
    parts = [part.strip() for part in words.split(",")]
    found: list[float] = []
    for i, part in enumerate(parts):
        if part == "...":
            if len(found) < 2 or i + 1 == len(parts) or found[-1] <= found[-2]:
                raise ConfigError(f"--sweep {words}: write ... as in 0,0.1,...,1")
            step, end = found[-1] - found[-2], _alpha(parts[i + 1], words)
            start = found[-1]
            found += [start + step * k for k in range(1, math.ceil((end - start) / step - 1e-6))]
        else:
            found.append(_alpha(part, words))
    return sorted({0.0, 1.0, *(round(alpha, 6) for alpha in found)})


def choose(points: Sequence[Point], task: str, retention: str, max_drop: float | None) -> Sweep:
    """Choose an alpha by the metrics `task` and `retention`; of equals the lowest.

    With `max_drop`: the best on the task among those that lose at most so much on the retention
    benchmark against alpha 0, the weights before fine-tuning. Without: the best mean of both.
    """
    allowed, rule = (
        points,
        f"the best mean of {task} on the task and {retention} on the retention benchmark",
    )
    if max_drop is None:
        best = max(allowed, key=lambda p: (p.task[task] + p.retention[retention], -p.alpha))
    else:
        floor = next(p.retention[retention] for p in points if p.alpha == 0) - max_drop
        allowed = [p for p in points if p.retention[retention] >= floor - 1e-9]
        best = max(allowed, key=lambda p: (p.task[task], -p.alpha))
        rule = (
            f"the best {task} on the task of those whose {retention} on the retention benchmark is "
            f"at least {floor:.1%}, {100 * max_drop:g} points under that of alpha 0"
        )
    return Sweep(list(points), task, retention, best.alpha, rule)


def sweep(
    first: Weights,
    second: Weights,
    alphas: Sequence[float],
    tasks: Sequence[Task],
    retention: Task,
    *,
    device: torch.device,
    max_drop: float | None = None,
) -> Sweep:
    """Measure every mixture (1 - alpha) * first + alpha * second on the tasks and on retention.

    The rule looks at zero-shot top-1 where it is measured, else at the first task's first figure.

    Raises:
        WeightsError: the two are not of one architecture.
    """
    mixtures = Mixtures(first, second, alphas, device)
    points = [
        Point(alpha, own.metrics, other.metrics)
        for alpha, own, other in zip(
            alphas,
            evaluate_each(mixtures, tasks),
            evaluate_each(mixtures, [retention]),
            strict=True,
        )
    ]
    names = [task.name for task in tasks]
    return choose(
        points,
        HEADLINES["zero_shot" if "zero_shot" in names else names[0]],
        HEADLINES[retention.name],
        max_drop,
    )


def _alpha(words: str, whole: str) -> float:
    try:
        alpha = float(words)
    except ValueError:
        alpha = math.nan
    if not 0 <= alpha <= 1:
        raise ConfigError(f"--sweep {whole}: {words!r} is no number between 0 and 1")
    return alpha


class Mixtures(Collection[tuple[CLIP, Preprocess]]):
    """One model that is each mixture in turn, as often as it is gone through.

    Each prepares images as `interpolate` says: as the nearer of the two.
    """

    def __init__(
        self, first: Weights, second: Weights, alphas: Sequence[float], device: torch.device
    ) -> None:
        self._alphas = alphas
        ends = [interpolate(first, second, alpha) for alpha in (0.0, 1.0)]
        self._preprocess = [end.preprocess for end in ends]
        self._ends = [
            {name: tensor.to(device) for name, tensor in end.tensors.items()} for end in ends
        ]
        assert ends[0].model is not None
        self._model = CLIP(**to_plain(ends[0].model)).to(device).eval()

    def __len__(self) -> int:
        return len(self._alphas)

    def __contains__(self, other: object) -> bool:
        return False  # a mixture is only while it is its turn

    def __iter__(self) -> Iterator[tuple[CLIP, Preprocess]]:
        first, second = self._ends
        for alpha in self._alphas:
            mixed = {name: between(first[name], second[name], alpha) for name in first}
            self._model.load_state_dict(mixed)
            preprocess = self._preprocess[alpha >= 0.5]
            assert preprocess is not None
            yield self._model, preprocess
