"""Training, evaluation and sweeps joined with their reports, for Python and the command line."""

import json
import shlex
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from leanclip.config.schema import Config
from leanclip.config.sections import to_plain
from leanclip.data.skipped import SkipTracker
from leanclip.distributed.collectives import barrier, from_first, rank_and_world_size
from leanclip.errors import ConfigError
from leanclip.evaluation import Report, evaluate, open_retention, open_tasks
from leanclip.evaluation.calibrated import calibrate, open_held_out
from leanclip.evaluation.sweep import Sweep
from leanclip.io.files import write_text
from leanclip.model import CLIP
from leanclip.report.plots import pareto_picture, run_pictures
from leanclip.report.report_page import write_report_page
from leanclip.report.text import count, headlines, sentences
from leanclip.training import checkpoint
from leanclip.training.determinism import allow_tf32
from leanclip.training.loop import SKIPPED
from leanclip.training.loop import train as run
from leanclip.training.plan import Plan, model_preprocess, split_and_classes
from leanclip.training.start import read_on_all_ranks
from leanclip.weights import SHARDS, Weights, interpolate, load_into, write_weights


@dataclass(frozen=True)
class RunResult:
    """What a run, or an evaluation of one, came to."""

    folder: Path
    report: Report
    page: Path  # report.html
    pictures: list[Path]
    seconds: float  # of training, over all starts
    finished_at: int | None = None  # the step at which an earlier start had finished the run


def train(plan: Plan, *, must_resume: bool = False) -> RunResult | None:
    """Train a planned run to the end and write its report; None on every rank but the first.

    Raises as `training.loop.train` does.
    """

    def write_report(report: Report, seconds: float, finished_at: int | None) -> RunResult:
        outcome = finish(plan.folder, report, seconds, pictures=plan.config.evaluate.pictures)
        return replace(outcome, finished_at=finished_at)

    return run(plan, write_report, must_resume=must_resume)


def evaluate_only(
    config: Config,
    device: torch.device,
    source: str | None = None,
    command: str = "",
    *,
    held_out: str | None = None,
    coverage: float = 0.9,
) -> RunResult | None:
    """Measure weights without training: of `source`, else of the run's folder, else `config.load`.

    Every rank calls this; the first one gives the outcome. `command` is what the report says
    measures the same again. `held_out` is a split, or a share of the images, to calibrate on.

    Raises:
        ConfigError: the configuration names nothing to evaluate.
        WeightsError: there are no weights, or they do not fit the model.
    """
    rank = rank_and_world_size()[0]
    if rank > 0:
        barrier()  # what the first rank prepares, such as an index, the others find
    tasks, retention = open_tasks(config), open_retention(config)
    names = {task.name: task for task in tasks}
    calibration = None if held_out is None else open_held_out(config, names, held_out)
    if rank == 0:
        barrier()
    if not tasks and retention is None:
        raise ConfigError("nothing to evaluate: set evaluate.zero_shot or evaluate.retrieval")
    folder = Path(config.output_dir)
    allow_tf32(config.tf32)
    model = CLIP(**to_plain(config.model))
    if source is None:
        has_run = from_first(lambda: any(folder.glob("checkpoints/step-*")))
        source = str(folder) if has_run else config.load
    source = source or str(folder)
    weights, _ = read_on_all_ranks(source, config.load_arch)
    load_into(model, weights, partial=config.load_partial)
    root = Path(source) / "checkpoints"
    progress = from_first(lambda: checkpoint.last_progress(root))
    baseline = progress.baseline if progress else {}
    preprocess = model_preprocess(config, source)
    report = evaluate(model.to(device), tasks, preprocess, retention=retention, baseline=baseline)
    if calibration is not None:
        calibrate(model, calibration, preprocess, report, coverage=coverage)
    report.source, report.command = source, command
    if rank > 0:
        return None
    return finish(folder, report, 0.0, pictures=config.evaluate.pictures)


def summary(outcome: RunResult) -> str:
    """A run in plain words: what it learned, where everything is, what to type next."""
    folder, report = outcome.folder, outcome.report
    lines = []
    if outcome.finished_at is not None:
        lines.append(
            f"{folder}: already finished, at step {outcome.finished_at:,} after "
            f"{outcome.seconds / 60:.1f} minutes of training; its metrics:"
        )
    elif outcome.seconds:
        lines.append(f"Trained for {outcome.seconds / 60:.1f} minutes.")
    lines += sentences(report)
    skipped = SkipTracker(0, 1, folder / SKIPPED)
    if skipped.found:
        lines.append(f"Training skipped {skipped.summary()}: see {skipped.path}")
    if report.bad:
        lines.append(
            f"Evaluation skipped {count(len(report.bad), 'sample')}: see {folder}/report.json"
        )
    if not report.results:
        lines.append("Nothing was evaluated: set evaluate.zero_shot or evaluate.retrieval.")
    measured = {
        f"Data:     {task.data.format} in {task.data.root}"
        f"{split_and_classes(task.data, task.dataset)}": None
        for task in report.tasks.values()
    }
    lines += [*measured, f"Folder:   {folder}"]
    progress = checkpoint.last_progress(folder / "checkpoints")
    if progress is not None and (best := progress.best) is not None:
        path = folder / "checkpoints" / f"step-{best.step:08d}"
        lines.append(f"Best:     {path}     ({best.metric} {best.value:.1%})")
    if metrics := headlines(report):
        lines.append(f"Metrics:  {metrics}")
    lines.append(f"Report:   {outcome.page}")
    lines += [f"Picture:  {picture}" for picture in outcome.pictures]
    if any(folder.glob(f"checkpoints/step-*/{SHARDS}")):
        lines.append(f"Next:     leanclip merge {folder} OUT     (its weights are in shards)")
    elif (folder / "config.yaml").is_file():
        lines += [
            f"Next:     leanclip eval --model {folder}",
            f"          leanclip train -c YOUR.yaml --load {folder}     (fine-tune it)",
        ]
    return "\n".join(lines)


def finish(folder: Path, report: Report, seconds: float, *, pictures: bool) -> RunResult:
    """Write report.json, report.html, and the pictures where they are wanted."""
    report.source = report.source or str(folder)
    report.command = report.command or shlex.join(["leanclip", "eval", "--model", str(folder)])
    folder.mkdir(parents=True, exist_ok=True)
    report.write(folder, sentences(report))
    if report.calibration is not None:
        report.calibration.save(folder)
    page = write_report_page(folder, report, SkipTracker(0, 1, folder / SKIPPED))
    drawn = run_pictures(folder, report) if pictures else []
    return RunResult(folder, report, page, drawn, seconds)


def write_sweep(
    folder: Path, found: Sweep, first: Weights, second: Weights, facts: dict[str, Any]
) -> list[Path]:
    """Write the chosen weights as a folder, with sweep.json and pareto.png; what was written."""
    weights = interpolate(first, second, found.chosen)
    write_weights(weights, folder, "leanclip", provenance=str(weights.source))
    write_text(folder / "sweep.json", json.dumps(found.facts() | facts, indent=1) + "\n")
    places = [(p.task[found.task], p.retention[found.retention]) for p in found.points]
    drawn = pareto_picture(
        places,
        [f"{point.alpha:g}" for point in found.points],
        chosen=[point.alpha for point in found.points].index(found.chosen),
        axes=(f"task: {found.task}", f"retention: {found.retention}"),
        path=folder / "pareto.png",
    )
    return [folder / "sweep.json", *drawn]
