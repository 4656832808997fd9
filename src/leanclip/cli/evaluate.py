"""The commands that measure: eval, compare, interpolate."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from leanclip.cli.options import (
    Arch,
    ConfigFile,
    DataSpec,
    NumGpus,
    NumProcs,
    OneGpu,
    Overrides,
    TaskName,
    Tf32,
    count_ranks,
    launch_ranks,
)
from leanclip.distributed import is_rank
from leanclip.distributed.launch import join_launch

if TYPE_CHECKING:
    import torch

    from leanclip.weights import Weights

app = typer.Typer(rich_markup_mode=None)


@app.command(
    name="eval",
    epilog="Example: leanclip eval --model runs/quickstart --data folder:data/shapes/unseen",
)
def evaluate(
    context: typer.Context,
    model: Annotated[
        str, typer.Option(help="A run's folder, a folder of weights, or a file (then with -c).")
    ],
    data_spec: DataSpec = None,
    task: TaskName = None,
    split: Annotated[
        str | None, typer.Option(help="The part of the data; default: one held out.")
    ] = None,
    classes: Annotated[
        str | None, typer.Option(metavar="FILE", help="Names of classes, one a line, by label.")
    ] = None,
    templates: Annotated[
        str | None, typer.Option(metavar="FILE", help="Prompts, one a line, {} for the name.")
    ] = None,
    train_split: Annotated[
        str | None, typer.Option(help="What probes learn from; default: train, else a half.")
    ] = None,
    shots: Annotated[
        int | None, typer.Option(min=1, help="Images a class for the linear probe; default: all.")
    ] = None,
    k: Annotated[
        int | None, typer.Option("--k", min=1, help="Neighbours of the k-NN probe; default: 20.")
    ] = None,
    config: ConfigFile = None,
    overrides: Overrides = None,
    num_gpus: NumGpus = None,
    num_procs: NumProcs = 1,
    arch: Arch = None,
    tf32: Tf32 = False,
    out: Annotated[
        str | None, typer.Option(help="Where to write report.json and pictures.")
    ] = None,
    held_out: Annotated[
        str | None,
        typer.Option(
            "--calibrate",
            metavar="SPLIT|SHARE",
            help="Write calibration.json, fitted to that split, or to a share of the images.",
        ),
    ] = None,
    coverage: Annotated[
        float, typer.Option(help="With --calibrate: how often a set is to hold the right class.")
    ] = 0.9,
) -> None:
    """Evaluate weights: zero-shot, retrieval, and probes of the image features.

    Writes report.json: metrics with 95% intervals, classes, hashes, the command to reproduce it.
    """
    import shlex

    from leanclip.api import evaluate_only, summary
    from leanclip.cli.evaluation_config import EvalOptions, evaluation_config
    from leanclip.distributed.collectives import choose_device, join_group

    ranks = count_ranks(num_gpus, num_procs)
    if ranks > 1 and not is_rank():
        launch_ranks(context.obj, "auto", num_gpus, ranks)
    join_launch()
    settings = evaluation_config(
        model,
        data_spec,
        task,
        config=config,
        arch=arch,
        overrides=overrides or (),
        out=out,
        options=EvalOptions(split, classes, templates, train_split, shots, k),
    )
    settings = settings.model_copy(update={"tf32": tf32 or settings.tf32})
    device = choose_device(settings.device, 0 if num_procs > 1 else num_gpus)
    join_group(device)
    command = shlex.join(["leanclip", *context.obj])
    outcome = evaluate_only(settings, device, model, command, held_out=held_out, coverage=coverage)
    if outcome is not None:
        print(summary(outcome))


@app.command(
    epilog="Example: leanclip compare ViT-B-32.pt runs/food101 --data food101:data/food-101"
)
def compare(
    first: Annotated[str, typer.Argument(metavar="A", help="Weights of any format.")],
    second: Annotated[str, typer.Argument(metavar="B", help="Weights of any format.")],
    data_spec: DataSpec = None,
    task: TaskName = None,
    config: ConfigFile = None,
    overrides: Overrides = None,
    arch: Arch = None,
    num_gpus: OneGpu = None,
    tf32: Tf32 = False,
    out: Annotated[
        Path | None, typer.Option(help="The folder to write; default: runs/compare-A-B.")
    ] = None,
) -> None:
    """Measure two models on the same samples: differences, and whether they could be luck.

    Writes compare.json and compare.html: which samples changed for better and worse.
    """
    from leanclip.cli.evaluation_config import evaluation_config
    from leanclip.distributed.collectives import choose_device
    from leanclip.evaluation import open_tasks
    from leanclip.evaluation.compare import compare as measure
    from leanclip.inference.load import load
    from leanclip.report.compare_page import write_comparison
    from leanclip.report.text import comparison_text

    settings = evaluation_config(
        first, data_spec, task, config=config, arch=arch, overrides=overrides or ()
    )
    device = choose_device(settings.device, num_gpus)
    tasks = open_tasks(settings.data, settings.evaluate)
    tf32 = tf32 or settings.tf32
    loaded = [load(one, arch=arch, device=device.type, tf32=tf32) for one in (first, second)]
    models = [(clip.model, clip.preprocess) for clip in loaded]
    found = measure(models[0], models[1], (first, second), tasks)
    folder = out or Path("runs") / f"compare-{Path(first).name}-{Path(second).name}"
    written = write_comparison(folder, found, tasks)
    print(comparison_text(found))
    for path in written:
        print(path)


@app.command(
    epilog="Example: leanclip interpolate ViT-B-32.pt runs/food101 --alpha 0.5 --out runs/between"
)
def interpolate(
    first: Annotated[str, typer.Argument(help="Weights of any format, such as those loaded.")],
    second: Annotated[str, typer.Argument(help="Weights of any format, such as those tuned.")],
    out: Annotated[Path, typer.Option(help="The folder to write.")],
    alpha: Annotated[
        float | None,
        typer.Option(
            min=0, max=1, help="The share of the second; 0 is the first alone. Default: 0.5."
        ),
    ] = None,
    sweep: Annotated[
        str | None,
        typer.Option(metavar="0,0.1,...,1", help="Alphas to measure; the best is written."),
    ] = None,
    data_spec: DataSpec = None,
    retention: Annotated[
        str | None,
        typer.Option(metavar="FORMAT:ROOT", help="With --sweep: what must not be forgotten."),
    ] = None,
    task: TaskName = None,
    max_drop: Annotated[
        float | None,
        typer.Option(
            min=0,
            max=1,
            help="With --sweep: the most that the retention metric may lose, such as 0.01; "
            "without it the best mean of both metrics is taken.",
        ),
    ] = None,
    arch: Arch = None,
    num_gpus: OneGpu = None,
) -> None:
    """Write weights between two others: (1 - alpha) * first + alpha * second, in float32.

    With --sweep, measure many alphas on --data and --retention, by default on what the second's run
    measured, and write the best.
    """
    from leanclip.errors import ConfigError
    from leanclip.weights import interpolate as between
    from leanclip.weights import read_weights, write_weights

    needs_sweep = {"--data": data_spec, "--retention": retention, "--max-drop": max_drop}
    given = [name for name, value in needs_sweep.items() if value is not None]
    if sweep is None and given:
        raise ConfigError(f"{given[0]}: goes with --sweep, for example --sweep 0,0.1,...,1")
    if sweep is not None and alpha is not None:
        raise ConfigError("--alpha: one alone is not swept; leave it or --sweep out")
    weights = read_weights(first, arch=arch), read_weights(second, arch=arch)
    if sweep is not None:
        from leanclip.distributed.collectives import choose_device

        device = choose_device("auto", num_gpus)
        _sweep(weights, second, sweep, data_spec, retention, task, max_drop, arch, device, out)
        return
    mixture = between(*weights, 0.5 if alpha is None else alpha)
    write_weights(mixture, out, "leanclip", provenance=str(mixture.source))
    print(f"{mixture.source} -> {out}")


def _sweep(
    weights: "tuple[Weights, Weights]",
    second: str,
    words: str,
    data_spec: str | None,
    retention_spec: str | None,
    task: str | None,
    max_drop: float | None,
    arch: str | None,
    device: "torch.device",
    out: Path,
) -> None:
    """Measure, choose, write, print."""
    from leanclip.api import write_sweep
    from leanclip.cli.evaluation_config import evaluation_config
    from leanclip.errors import ConfigError
    from leanclip.evaluation import open_retention, open_tasks
    from leanclip.evaluation.sweep import parse_alphas, sweep
    from leanclip.report.text import sweep_text
    from leanclip.training.determinism import allow_tf32

    alphas = parse_alphas(words)
    if out.exists():
        raise ConfigError(f"{out}: is there already; name a folder that is not")
    settings = evaluation_config(second, data_spec, task, arch=arch)
    tasks = open_tasks(settings.data, settings.evaluate)
    if retention_spec is not None:
        own = evaluation_config(second, retention_spec, arch=arch)
        retention = open_tasks(own.data, own.evaluate)[-1]
    else:
        retention = open_retention(settings.data, settings.evaluate)
    allow_tf32(settings.tf32)
    if retention is None or not tasks:
        raise ConfigError(
            "--sweep: needs --data and --retention, or what the second's run measured"
        )
    found = sweep(*weights, alphas, tasks, retention, device=device, max_drop=max_drop)
    roots = {"task_data": [one.data.root for one in tasks], "retention_data": retention.data.root}
    written = write_sweep(out, found, *weights, roots)
    print(sweep_text(found))
    print(f"{1 - found.chosen:g} * {weights[0].source} + {found.chosen:g} * {weights[1].source} "
          f"-> {out}")  # fmt: skip
    for path in written:
        print(path)
