"""When something happens in a run: learning rate, logging, saves, evaluations, early stopping.

Pure functions of the plan, the step and metrics that every rank has, so that all ranks agree.
"""

from collections.abc import Mapping

from leanclip.training.checkpoint import Best
from leanclip.training.optimizer import learning_rate
from leanclip.training.plan import Plan


def learning_rate_at(plan: Plan, step: int) -> float:
    """The learning rate of a step, by its place in the data."""
    return learning_rate(
        step - plan.offset, peak=plan.peak_learning_rate, warmup=plan.warmup_steps, steps=plan.steps
    )


def is_due(step: int, plan: Plan, every_epochs: int | None, every_steps: int | None = None) -> bool:
    """Whether something is due after this step: at the end, every few epochs or every few steps."""
    by_epoch = (
        every_epochs is not None
        and (step - plan.offset) % (every_epochs * plan.steps_per_epoch) == 0
    )
    by_step = every_steps is not None and step % every_steps == 0
    return step == plan.last_step or by_epoch or by_step


def update_best(
    plan: Plan, best: Best | None, metrics: Mapping[str, float], step: int
) -> Best | None:
    """The best evaluation so far, given a new one; None without `checkpoint.best_metric`.

    An earlier best by another metric does not count. The first of equals stays.
    """
    metric = plan.config.checkpoint.best_metric
    if metric is None:
        return None
    if best is None or best.metric != metric or metrics[metric] > best.value:
        return Best(metric, metrics[metric], step, 0)
    return best._replace(since=best.since + 1)


def improved(plan: Plan, best: Best | None) -> bool:
    """Whether the evaluation just made needs a checkpoint: it is the best, or the run ends."""
    return best is not None and (best.since == 0 or should_stop(plan, best))


def should_stop(plan: Plan, best: Best | None) -> bool:
    """Whether `evaluate.patience` is exhausted."""
    patience = plan.config.evaluate.patience
    if patience is None or best is None or best.metric != plan.config.checkpoint.best_metric:
        return False
    return best.since >= patience
