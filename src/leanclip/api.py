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
from leanclip.evaluation.calibration import calibrate, open_held_out
from leanclip.evaluation.sweep import Sweep
from leanclip.evaluation.zero_shot import ZeroShotResult
from leanclip.io.files import write_text
from leanclip.model import CLIP
from leanclip.report.plots import pareto_picture, run_pictures
from leanclip.report.report_page import write_report
from leanclip.report.text import count, headlines, sentences, sweep_rule
from leanclip.training import checkpoint
from leanclip.training.determinism import allow_tf32
from leanclip.training.loop import SKIPPED
from leanclip.training.loop import train as run
from leanclip.training.plan import Plan, model_preprocess, split_and_classes
from leanclip.training.start import read_on_all_ranks
from leanclip.weights import SHARDS, Weights, interpolate, load_into, write_weights


@dataclass(frozen=True)
class RunResult:
    """The results of a run, or of an evaluation."""

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

    def write_results(report: Report, seconds: float, finished_at: int | None) -> RunResult:
        result = finish(plan.folder, report, seconds, pictures=plan.config.evaluate.pictures)
        return replace(result, finished_at=finished_at)

    return run(plan, write_results, must_resume=must_resume)


def evaluate_only(
    config: Config,
    device: torch.device,
    source: str | None = None,
    command: str = "",
    *,
    held_out: str | None = None,
    coverage: float = 0.9,
) -> RunResult | None:
    """Evaluate weights without training: `source`, else the run's folder, else `config.load`.

    Every rank calls this; the first one returns the result. `command` reproduces the report.
    `held_out` is a split, or a fraction of the images, to calibrate on.

    Raises:
        ConfigError: the configuration names nothing to evaluate.
        WeightsError: there are no weights, or they do not fit the model.
    """
    rank = rank_and_world_size()[0]
    if rank > 0:
        barrier()  # the first rank prepares indices and the like
    tasks = open_tasks(config.data, config.evaluate)
    retention = open_retention(config.data, config.evaluate)
    zero_shot = next((task for task in tasks if task.name == "zero_shot"), None)
    calibration = None if held_out is None else open_held_out(zero_shot, held_out)
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
        result = report.results.get("zero_shot")
        assert result is None or isinstance(result, ZeroShotResult)
        report.add_calibration(
            calibrate(
                model, calibration, preprocess, result, coverage=coverage, weights=report.weights
            )
        )
    report.source, report.command = source, command
    if rank > 0:
        return None
    return finish(folder, report, 0.0, pictures=config.evaluate.pictures)


def summary(result: RunResult) -> str:
    """A run for a terminal: its metrics, where its files are, the next commands."""
    folder, report = result.folder, result.report
    lines = []
    if result.finished_at is not None:
        lines.append(
            f"{folder}: already finished, at step {result.finished_at:,} after "
            f"{result.seconds / 60:.1f} minutes of training; its metrics:"
        )
    elif result.seconds:
        lines.append(f"Trained for {result.seconds / 60:.1f} minutes.")
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
    evaluated = {
        f"Data:     {task.data.format} in {task.data.root}"
        f"{split_and_classes(task.data, task.dataset)}": None
        for task in report.tasks.values()
    }
    lines += [*evaluated, f"Folder:   {folder}"]
    progress = checkpoint.last_progress(folder / "checkpoints")
    if progress is not None and (best := progress.best) is not None:
        path = folder / "checkpoints" / f"step-{best.step:08d}"
        lines.append(f"Best:     {path}     ({best.metric} {best.value:.1%})")
    if metrics := headlines(report):
        lines.append(f"Metrics:  {metrics}")
    lines.append(f"Report:   {result.page}")
    lines += [f"Picture:  {picture}" for picture in result.pictures]
    if any(folder.glob(f"checkpoints/step-*/{SHARDS}")):
        lines.append(f"Next:     leanclip merge {folder} OUT     (its weights are in shards)")
    elif (folder / "config.yaml").is_file():
        lines += [
            f"Next:     leanclip eval --model {folder}",
            f"          leanclip train -c YOUR.yaml --load {folder}     (fine-tune it)",
        ]
    return "\n".join(lines)


def finish(folder: Path, report: Report, seconds: float, *, pictures: bool) -> RunResult:
    """Write report.json, report.html, calibration.json if there is one, and pictures."""
    report.source = report.source or str(folder)
    report.command = report.command or shlex.join(["leanclip", "eval", "--model", str(folder)])
    folder.mkdir(parents=True, exist_ok=True)
    if report.calibrated is not None:
        report.calibrated.calibration.save(folder)
    page = write_report(folder, report, SkipTracker(0, 1, folder / SKIPPED))
    drawn = run_pictures(folder, report) if pictures else []
    return RunResult(folder, report, page, drawn, seconds)


def write_sweep(
    folder: Path, sweep: Sweep, first: Weights, second: Weights, data: dict[str, Any]
) -> list[Path]:
    """Write the chosen weights, sweep.json and pareto.png into a folder; `data` names the data."""
    weights = interpolate(first, second, sweep.chosen)
    write_weights(weights, folder, "leanclip", provenance=str(weights.source))
    values = {
        "chosen": sweep.chosen,
        "rule": sweep_rule(sweep),
        "task": sweep.task,
        "retention": sweep.retention,
        "points": [vars(point) for point in sweep.points],
    }
    write_text(folder / "sweep.json", json.dumps(values | data, indent=1) + "\n")
    pareto_picture(sweep, folder / "pareto.png")
    return [folder / "sweep.json", folder / "pareto.png"]
