"""Evaluation results as text: labels and formats of metrics, a sentence per task, comparisons."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from leanclip.evaluation.compare import Comparison
from leanclip.evaluation.probe import ProbeResult
from leanclip.evaluation.results import Report, Result
from leanclip.evaluation.retrieval import RetrievalResult
from leanclip.evaluation.statistics import McNemar
from leanclip.evaluation.sweep import Sweep
from leanclip.evaluation.tasks import HEADLINES, RETENTION, Task

NOT_FRACTIONS = ("_rank", "_size")  # endings of metrics that are not fractions of 1
CLASSIFIERS = {"zeroshot": "zero-shot", "linear_probe": "linear probe", "knn": "k-NN"}
CLASSIFIER_METRICS = {
    "top1": "top-1",
    "top5": "top-5",
    "mean_per_class": "mean per-class accuracy",
    "ece": "ECE",
}
DIRECTIONS = {"image_to_text": "image→text", "text_to_image": "text→image"}
OTHER_LABELS = {
    "calibrated_ece_before": "ECE before calibration",
    "calibrated_ece": "ECE after calibration",
    "calibrated_coverage": "prediction-set coverage",
    "calibrated_set_size": "mean prediction-set size",
    "calibrated_none": "rejected as none of the classes",
}
FIRST = ("zeroshot_top1", "image_to_text_R@1", "text_to_image_R@1", "zeroshot_mean_per_class",
         "linear_probe_top1", "knn_top1")  # fmt: skip


def format_metric(name: str, value: float) -> str:
    """A metric's value: a percentage, a rank, or "NaN" if it is not finite."""
    if not math.isfinite(value):
        return "NaN"
    return f"{value:,.4g}" if name.endswith(NOT_FRACTIONS) else f"{value:.1%}"


def format_interval(name: str, interval: Sequence[float]) -> str:
    """A metric's interval."""
    return "–".join(format_metric(name, end) for end in interval)


def metric_label(name: str) -> str:
    """A metric's name as papers write it."""
    if name.startswith(RETENTION):
        return f"retention: {metric_label(name.removeprefix(RETENTION))}"
    for start, label in CLASSIFIERS.items():
        metric = name.removeprefix(f"{start}_")
        if metric != name and metric in CLASSIFIER_METRICS:
            return f"{label} {CLASSIFIER_METRICS[metric]}"
    for start, label in DIRECTIONS.items():
        if name.startswith(f"{start}_"):
            return f"{label} {name.removeprefix(f'{start}_').replace('_', ' ')}"
    return OTHER_LABELS.get(name, name.replace("_", " "))


def count(number: int, singular: str, plural: str | None = None) -> str:
    """A number with its noun: 1 image, 1,200 images."""
    return f"{number:,} {singular if number == 1 else plural or f'{singular}s'}"


def by_importance(report: Report) -> list[str]:
    """The names of all metrics, the most important first."""
    first = [name for name in FIRST if name in report.metrics]
    return [*first, *(name for name in report.metrics if name not in first)]


def headlines(report: Report) -> str:
    """The first two metrics with their intervals, on one line."""
    found = []
    for name in by_importance(report)[:2]:
        words = f"{metric_label(name)} {format_metric(name, report.metrics[name])}"
        if name in report.intervals:
            words += f" (95% CI {format_interval(name, report.intervals[name])})"
        found.append(words)
    return ", ".join(found)


def sentences(report: Report) -> list[str]:
    """A sentence per task, one on retention, one on calibration."""
    found = []
    for name, result in report.results.items():
        is_retention = name.startswith(RETENTION)
        found += [
            retention_sentence(report)
            if is_retention
            else task_sentence(report.tasks[name], result),
            sample_note(report.data[name]),
        ]
    found += [_calibration_sentence(report)]
    return list(filter(None, found))


def task_sentence(task: Task, result: Result) -> str:
    """A task's main metrics, as in papers."""
    metrics, images = result.metrics(), count(len(result.indices), "image")
    if isinstance(result, RetrievalResult):
        recalls = ", ".join(
            f"{metrics[f'{way}_R@1']:.1%} {label}" for way, label in DIRECTIONS.items()
        )
        return f"Retrieval ({images}, {count(len(result.captions), 'caption')}): R@1 {recalls}."
    size = len(result.classes)
    about = f"{task.dataset.about} " if task.dataset.about else ""
    on = f"{images} of {size:,} {about}{'class' if size == 1 else 'classes'}"
    words = f"top-1 {format_metric('top1', metrics['top1'])}"
    if size > 5:
        words += f", top-5 {format_metric('top5', metrics['top5'])}"
    words += f" (chance {1 / size:.1%})."
    if not isinstance(result, ProbeResult):
        return f"Zero-shot on {on}: {words}"
    source = f"{count(result.learned, 'labelled image')} of {task.data.root}, "
    source += (
        f"split {task.train.data.split}"
        if task.train
        else "half of each class, tested on the other half"
    )
    if task.shots is not None:
        source += f", {count(task.shots, 'image')} per class"
    if task.name == "linear_probe":
        return (
            f"Linear probe on {on}: {words} Trained on {source}; L2 strength {result.setting:.3g}."
        )
    return f"k-NN (k = {result.setting:.0f}) on {on}: {words} Neighbours from {source}."


def retention_sentence(report: Report) -> str:
    """The retention benchmark's metric before and after training, then those of other tasks.

    Without a baseline, the retention benchmark's metric alone.
    """
    baseline, metrics = report.baseline, report.metrics
    (retention,) = (task for name, task in report.tasks.items() if name.startswith(RETENTION))
    metric = HEADLINES[retention.name]
    words = f"Retention ({retention.data.root}): {metric_label(metric)}"
    if RETENTION + metric not in baseline:
        return f"{words} {metrics[RETENTION + metric]:.1%}."
    parts = [f"{words} {_change(baseline[RETENTION + metric], metrics[RETENTION + metric])}"]
    parts += [
        f"{metric_label(name)} on {task.data.root} {_change(baseline[name], metrics[name])}"
        for key, task in report.tasks.items()
        if not key.startswith(RETENTION) and (name := HEADLINES[task.name]) in baseline
    ]
    return f"{'; '.join(parts)}."


def _change(before: float, after: float) -> str:
    if before == after:
        return f"unchanged at {after:.1%}"
    return f"{before:.1%} before, {after:.1%} after ({format_points(after - before)} points)"


def format_points(difference: float) -> str:
    """A difference of fractions in percentage points."""
    return f"{100 * difference:+.1f}"


def sample_note(data: Mapping[str, Any]) -> str:
    """A note if only a sample of a data set was evaluated, else ""."""
    if data.get("limit") is None or data["limit"] >= data["available"]:
        return ""
    return (
        f"Evaluated on a fixed sample of {data['limit']:,} of the {data['available']:,} images of "
        f"{data['root']} (limit); it does not depend on the model or the seed."
    )


def _calibration_sentence(report: Report) -> str:
    found = report.calibrated
    if found is None:
        return ""
    held_out = found.held_out
    where = f"split {held_out}" if isinstance(held_out, str) else f"{held_out:.0%} of the images"
    shown = {name: format_metric(name, value) for name, value in found.metrics.items()}
    return (
        f"Calibration on {where} ({count(found.images, 'image')}): "
        f"ECE {shown['calibrated_ece_before']} before, {shown['calibrated_ece']} after "
        f"(temperature {found.calibration.temperature:.2f}); "
        f"{found.calibration.coverage:.0%} prediction sets contain the right class for "
        f"{shown['calibrated_coverage']} of {count(found.test_images, 'image')} "
        f"({found.metrics['calibrated_set_size']:.2f} classes on average); "
        f"{shown['calibrated_none']} rejected as none of the classes."
    )


def mcnemar_sentence(name: str, test: McNemar) -> str:
    """The result of McNemar's test for a metric."""
    p = f"p = {test.p:.2g}" if test.p >= 1e-4 else "p < 0.0001"
    verdict = "significant" if test.p < 0.05 else "not significant"
    return (
        f"{metric_label(name)}: only B correct on {test.better:,}, only A correct on "
        f"{test.worse:,}; McNemar {p} ({test.method}), {verdict} at 5%."
    )


def comparison_notes(comparison: Comparison) -> list[str]:
    """Sentences on the tests, and on the evaluated samples."""
    tests = [mcnemar_sentence(name, test) for name, test in comparison.tests.items()]
    notes = map(sample_note, comparison.reports[0].data.values())
    return [*tests, *dict.fromkeys(filter(None, notes))]


def comparison_text(comparison: Comparison) -> str:
    """A comparison as lines for a terminal."""
    lines = [f"{letter}: {name}" for letter, name in zip("AB", comparison.names, strict=True)]
    width = max((len(metric_label(one.name)) for one in comparison.differences), default=0)
    for one in comparison.differences:
        low, high = map(format_points, one.interval)
        lines.append(
            f"{metric_label(one.name):<{width}}  A {one.first:>6.1%}  B {one.second:>6.1%}  "
            f"B - A {format_points(one.difference)} (95% CI {low} to {high})"
        )
    return "\n".join([*lines, *comparison_notes(comparison)])


def sweep_rule(sweep: Sweep) -> str:
    """How the alpha was chosen."""
    if sweep.max_drop is None:
        return f"the best mean of {sweep.task} on the task and {sweep.retention} on retention"
    baseline = next(p.retention[sweep.retention] for p in sweep.points if p.alpha == 0)
    return (
        f"the best {sweep.task} on the task with {sweep.retention} on retention of at least "
        f"{baseline - sweep.max_drop:.1%}, {100 * sweep.max_drop:g} points below alpha 0"
    )


def sweep_text(sweep: Sweep) -> str:
    """The metrics that the rule uses, one line per alpha, and the choice."""
    lines = [f"alpha  task {sweep.task}  retention {sweep.retention}"]
    for point in sweep.points:
        mark = "  <- chosen" if point.alpha == sweep.chosen else ""
        lines.append(
            f"{point.alpha:<5g}  {point.task[sweep.task]:>{len(sweep.task) + 5}.1%}  "
            f"{point.retention[sweep.retention]:>{len(sweep.retention) + 10}.1%}{mark}"
        )
    return "\n".join([*lines, f"chosen: {sweep.chosen:g}, {sweep_rule(sweep)}"])
