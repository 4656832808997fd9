"""A sweep between two models: metrics on a task and on a retention benchmark for every alpha.

A, B, alphas -> interpolated weights -> metrics of task and retention -> the chosen alpha
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from leanclip.config.sections import to_plain
from leanclip.errors import ConfigError
from leanclip.evaluation.evaluator import evaluate
from leanclip.evaluation.tasks import HEADLINES, Task
from leanclip.model import CLIP
from leanclip.weights import Weights, interpolate
from leanclip.weights.interpolate import interpolate_tensor


@dataclass(frozen=True)
class Point:
    """The metrics of one mixture, by name."""

    alpha: float
    task: dict[str, float]
    retention: dict[str, float]


@dataclass(frozen=True)
class Sweep:
    """All mixtures, by alpha, and the chosen one."""

    points: list[Point]
    task: str  # the names of the metrics that the rule uses
    retention: str
    max_drop: float | None  # of the retention metric; None: the rule is the best mean of both
    chosen: float  # alpha


def parse_alphas(words: str) -> list[float]:
    """`0,0.1,...,1` -> the numbers, rising, with 0 and 1, which are always evaluated.

    `...` continues with the step between the two numbers before it, up to the one after it.

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
    """Choose an alpha by the metrics `task` and `retention`; the lowest of equals.

    With `max_drop`: the best on the task among those that lose at most so much on the retention
    benchmark against alpha 0, the weights before fine-tuning. Without: the best mean of both.
    """
    if max_drop is None:
        best = max(points, key=lambda p: (p.task[task] + p.retention[retention], -p.alpha))
    else:
        floor = next(p.retention[retention] for p in points if p.alpha == 0) - max_drop
        allowed = [p for p in points if p.retention[retention] >= floor - 1e-9]
        best = max(allowed, key=lambda p: (p.task[task], -p.alpha))
    return Sweep(list(points), task, retention, max_drop, best.alpha)


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
    """Evaluate every mixture (1 - alpha) * first + alpha * second on the tasks and on retention.

    The rule uses zero-shot top-1 if it is evaluated, else the first task's main metric.

    Raises:
        WeightsError: the two differ in architecture.
    """
    ends = [interpolate(first, second, alpha) for alpha in (0.0, 1.0)]  # all tensors, in float32
    start, stop = (end.tensors for end in ends)
    assert ends[0].model is not None
    model = CLIP(**to_plain(ends[0].model)).to(device)
    model.tokenizer = ends[0].tokenizer or model.tokenizer
    points = []
    for alpha in alphas:
        model.load_state_dict(
            {name: interpolate_tensor(start[name], stop[name], alpha) for name in start}
        )
        preprocess = ends[alpha >= 0.5].preprocess
        assert preprocess is not None
        own, other = (evaluate(model, some, preprocess) for some in (tasks, [retention]))
        points.append(Point(alpha, own.metrics, other.metrics))
    names = [task.name for task in tasks]
    metric = HEADLINES["zero_shot" if "zero_shot" in names else names[0]]
    return choose(points, metric, HEADLINES[retention.name], max_drop)


def _alpha(words: str, whole: str) -> float:
    try:
        alpha = float(words)
    except ValueError:
        alpha = math.nan
    if not 0 <= alpha <= 1:
        raise ConfigError(f"--sweep {whole}: {words!r} is not a number between 0 and 1")
    return alpha
