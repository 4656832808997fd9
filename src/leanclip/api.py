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
from leanclip.data.tools.findings import find, paired_images
from leanclip.distributed.collectives import (
    barrier,
    choose_device,
    from_first,
    join_group,
    rank_and_world_size,
)
from leanclip.errors import ConfigError, SampleError
from leanclip.evaluation import Report, evaluate, open_retention, open_tasks
from leanclip.evaluation.calibration import calibrate, open_held_out
from leanclip.evaluation.compare import compare as compare_models
from leanclip.evaluation.sweep import Sweep, parse_alphas, sweep
from leanclip.evaluation.tasks import evaluation_data
from leanclip.evaluation.zero_shot import ZeroShotResult
from leanclip.inference.load import load
from leanclip.io.files import write_text
from leanclip.io.progress import ProgressBar
from leanclip.model import CLIP
from leanclip.preprocess.text import Tokenizer
from leanclip.report.compare_page import write_comparison
from leanclip.report.data_check import problems
from leanclip.report.plots import check_pictures, image_grid, pareto_picture, run_pictures
from leanclip.report.report_page import write_report
from leanclip.report.text import (
    comparison_text,
    count,
    headlines,
    sentences,
    sweep_rule,
    sweep_text,
)
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
    split_and_classes,
)
from leanclip.training.start import read_on_all_ranks
from leanclip.training.stored import model_preprocess, model_tokenizer
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
    tasks = open_tasks(config.data, config.evaluate)
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
    values, tasks = parse_alphas(alphas), open_tasks(config.data, config.evaluate)
    if retention_config:
        retention = open_tasks(retention_config.data, retention_config.evaluate)[-1]
    else:
        retention = open_retention(config.data, config.evaluate)
    if retention is None or not tasks:
        raise ConfigError("--sweep: needs --data and --retention, or a run that has evaluated both")
    weights = read_weights(first, arch=arch), read_weights(second, arch=arch)
    allow_tf32(config.tf32)
    device = choose_device("auto", num_gpus)
    found = sweep(*weights, values, tasks, retention, device=device, max_drop=max_drop)
    roots = {"task_data": [one.data.root for one in tasks], "retention_data": retention.data.root}
    written = write_sweep(folder, found, *weights, roots)
    mixture = f"{1 - found.chosen:g} * {weights[0].source} + {found.chosen:g} * {weights[1].source}"
    return [sweep_text(found), f"{mixture} -> {folder}", *map(str, written)]


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
) -> tuple[dict[str, Any], list[str], list[Path]]:
    """Check all samples of a data set, and of `config`'s evaluation data unless splits are named.

    Args:
        data: the training data.
        config: for its evaluation data, batch size and context length; None: 1024 and 77.
        folder: for check.json and pictures.
        splits: the splits to check; none: all.
        batch_size: see `findings.find`.
        max_problems, max_leakage: see `problems`.
        workers: see `read_parts`.

    Returns:
        The findings, those above the thresholds as one line each, and the files written.
    """
    more = evaluation_data(config.data, config.evaluate) if config and not splits else []
    parts = open_parts([data, *more], splits)
    tokenizer = model_tokenizer(config) if config else Tokenizer()
    with ProgressBar("reading", sum(len(part.dataset) for part in parts)) as bar:
        read_parts(
            parts,
            tokenizer=tokenizer,
            workers=workers,
            progress=lambda done, total: bar.update(done),
        )
    findings = find(
        parts,
        batch_size=batch_size or (config.train.batch_size if config else 1024),
        context_length=tokenizer.context_length,
    )
    over = problems(findings.values, max_problems=max_problems, max_leakage=max_leakage)
    text = json.dumps(findings.values | {"problems": over}, indent=2)
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / "check.json", text + "\n")
    pictures = check_pictures(folder, examples(parts), paired_images(parts, findings))
    return findings.values, over, [folder / "check.json", *pictures]


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
