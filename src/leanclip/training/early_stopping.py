"""Which evaluation of a run was the best, and when a run that gains no more ends.

All of it follows from figures that every rank has, so that all ranks do the same.
"""

from collections.abc import Mapping

from leanclip.training.checkpoint import Best
from leanclip.training.plan import Plan


def by_evaluation(figures: Mapping[str, float]) -> dict[str, float]:
    """An evaluation's figures as metrics.jsonl names them: `val/...`, and `retention/...`."""
    return {k if k.startswith("retention/") else f"val/{k}": v for k, v in figures.items()}


def update_best(
    plan: Plan, best: Best | None, figures: Mapping[str, float], step: int
) -> Best | None:
    """The best evaluation after one more; None where the settings name no metric.

    An earlier best by another metric does not count. Of equals the first stays.
    """
    metric = plan.config.checkpoint.best_metric
    if metric is None:
        return None
    if best is None or best.metric != metric or figures[metric] > best.value:
        return Best(metric, figures[metric], step, 0)
    return best._replace(since=best.since + 1)


def improved(plan: Plan, best: Best | None) -> bool:
    """Whether a checkpoint is to be written: the best there was, or the last there will be."""
    return best is not None and (best.since == 0 or should_stop(plan, best))


def should_stop(plan: Plan, best: Best | None) -> bool:
    """Whether the run ends here, by `evaluate.patience`."""
    patience = plan.config.evaluate.patience
    if patience is None or best is None or best.metric != plan.config.checkpoint.best_metric:
        return False
    return best.since >= patience
