"""Training, evaluation and sweeps joined with their reports, for Python and the command line."""

import json
import logging
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from leanclip.config.data import DataConfig
from leanclip.config.schema import Config
from leanclip.config.sections import to_plain
from leanclip.data.skipped import SkipTracker
from leanclip.data.tools.check import examples, open_parts, read_parts
from leanclip.data.tools.findings import Findings, find, paired_images
from leanclip.distributed.collectives import (
    barrier,
    choose_device,
    from_first,
    join_group,
    rank_and_world_size,
)
from leanclip.errors import ConfigError, SampleError
from leanclip.evaluation import Report, evaluate, open_retention, open_tasks
from leanclip.evaluation.calibrated import calibrate, open_held_out
from leanclip.evaluation.compare import compare as compare_models
from leanclip.evaluation.sweep import Sweep, parse_alphas, sweep
from leanclip.evaluation.tasks import evaluation_data
from leanclip.inference.model import load
from leanclip.io.files import write_text
from leanclip.io.progress import ProgressBar
from leanclip.model import CLIP
from leanclip.report.compare_page import write_comparison
from leanclip.report.plots import check_pictures, image_grid, pareto_picture, run_pictures
from leanclip.report.report_page import write_report_page
from leanclip.report.text import comparison_text, count, headlines, sentences
from leanclip.search import Hit, Index
from leanclip.training import checkpoint
from leanclip.training.determinism import allow_tf32
from leanclip.training.loop import SKIPPED
from leanclip.training.loop import train as run
from leanclip.training.plan import (
    Plan,
    batch_warnings,
    describe,
    headline,
    make_plan,
    model_preprocess,
    split_and_classes,
)
from leanclip.training.start import read_on_all_ranks
from leanclip.weights import (
    SHARDS,
    Weights,
    interpolate,
    load_into,
    read_weights,
    write_weights,
)

log = logging.getLogger("leanclip")


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
    before = progress.before if progress else {}
    preprocess = model_preprocess(config, source)
    report = evaluate(model.to(device), tasks, preprocess, retention=retention, before=before)
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


def compare(
    config: Config,
    first: str,
    second: str,
    folder: Path,
    *,
    arch: str | None = None,
    num_gpus: int | None = None,
) -> tuple[str, list[Path]]:
    """Evaluate two models on `config`'s tasks and write a comparison; its text and its files."""
    tasks = open_tasks(config)
    device = choose_device(config.device, num_gpus)
    loaded = [load(s, arch=arch, device=device, tf32=config.tf32) for s in (first, second)]
    models = [(clip.model, clip.preprocess) for clip in loaded]
    found = compare_models(models[0], models[1], (first, second), tasks)
    return comparison_text(found), write_comparison(folder, found, tasks)


def sweep_and_write(
    config: Config,
    retention_config: Config | None,
    first: str,
    second: str,
    alphas: str,
    folder: Path,
    *,
    max_drop: float | None = None,
    arch: str | None = None,
    num_gpus: int | None = None,
) -> list[str]:
    """Evaluate mixtures of two models and write the best one; a table and the files, as lines.

    Args:
        config: for the tasks, and for the retention benchmark if it has no `retention_config`.
        retention_config: its last task is the retention benchmark.
        first, second: weights; alpha is the fraction of the second.
        alphas: as "0,0.1,...,1".
        folder: new, for the weights, sweep.json and pareto.png.
        max_drop: see `sweep`.
        arch, num_gpus: as on the command line.

    Raises:
        ConfigError: the folder exists, or there is no data to evaluate on.
        WeightsError: the weights cannot be read, or differ in architecture.
    """
    if folder.exists():
        raise ConfigError(f"{folder}: already exists; choose another name")
    values, tasks = parse_alphas(alphas), open_tasks(config)
    retention = open_tasks(retention_config)[-1] if retention_config else open_retention(config)
    if retention is None or not tasks:
        raise ConfigError("--sweep: needs --data and --retention, or a run that has evaluated both")
    weights = read_weights(first, arch=arch), read_weights(second, arch=arch)
    allow_tf32(config.tf32)
    device = choose_device("auto", num_gpus)
    found = sweep(*weights, values, tasks, retention, device=device, max_drop=max_drop)
    roots = {"task_data": [one.data.root for one in tasks], "guard_data": retention.data.root}
    written = write_sweep(folder, found, *weights, roots)
    mixture = f"{1 - found.chosen:g} * {weights[0].source} + {found.chosen:g} * {weights[1].source}"
    return [found.table(), f"{mixture} -> {folder}", *map(str, written)]


def check_data(
    data: DataConfig,
    config: Config | None,
    folder: Path,
    *,
    splits: Sequence[str] = (),
    batch_size: int | None = None,
    max_problems: float = 0.01,
    max_leakage: float | None = None,
    workers: int | None = None,
) -> tuple[Findings, list[Path]]:
    """Check all samples of a data set, and of `config`'s evaluation data unless splits are named.

    Args:
        data: the training data.
        config: for its evaluation data, batch size and context length; None: 1024 and 77.
        folder: for check.json and pictures.
        splits: the splits to check; none: all.
        batch_size, max_problems, max_leakage: see `findings.find`.
        workers: see `read_parts`.

    Returns:
        The findings, and the files written.
    """
    more = evaluation_data(config) if config and not splits else []
    parts = open_parts([data, *more], splits)
    with ProgressBar("reading", sum(len(part.dataset) for part in parts)) as bar:
        read_parts(parts, workers=workers, progress=lambda done, total: bar.update(done))
    findings = find(
        parts,
        batch_size=batch_size or (config.train.batch_size if config else 1024),
        context_length=config.model.context_length if config else 77,
        max_problems=max_problems,
        max_leakage=max_leakage,
    )
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / "check.json", json.dumps(findings.to_plain(), indent=2) + "\n")
    pictures = check_pictures(folder, examples(parts), paired_images(parts, findings))
    return findings, [folder / "check.json", *pictures]


def draw_hits(index: Index, hits: Sequence[Hit], path: Path) -> None:
    """Draw search results as a grid, except for images that can no longer be read."""
    images, titles = [], []
    for hit in hits:
        try:
            images.append(index.read(hit.number))
        except SampleError as error:
            log.warning("not drawn: %s", error)
        else:
            titles.append(f"{hit.score:.3f} {Path(hit.path).name}")
    if images:
        image_grid(images, titles, path)
        log.info("%s", path)


def run_training(
    config: Config,
    *,
    num_gpus: int | None = None,
    ranks: int = 1,
    must_resume: bool = False,
    dry_run: bool = False,
    only_evaluate: bool = False,
    source: str | None = None,
) -> str | None:
    """What `leanclip train` does on each rank; the text to print, None on every rank but the first.

    Args:
        config: the configuration.
        num_gpus: see `choose_device`.
        ranks: how many processes a dry run plans for.
        must_resume: see `train`.
        dry_run: only describe the plan.
        only_evaluate: evaluate `source` or the run's weights, without training.
        source: weights.
    """
    device = choose_device(config.device, num_gpus)
    join_group(device)
    if only_evaluate:
        result = evaluate_only(config, device, source)
        return summary(result) if result else None
    plan = make_plan(config, device, ranks=ranks)
    if dry_run:
        return describe(plan) if rank_and_world_size()[0] == 0 else None
    log.info("%s", headline(plan))
    for warning in batch_warnings(plan):
        log.warning("%s", warning)
    result = train(plan, must_resume=must_resume)
    return summary(result) if result else None
