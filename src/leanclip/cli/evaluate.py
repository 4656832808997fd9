"""The commands that evaluate: eval, compare."""

from pathlib import Path
from typing import Annotated

from typer import Argument, Context, Option, Typer

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

app = Typer(rich_markup_mode=None)

Split = Annotated[str | None, Option(help="Split to evaluate on. Default: held out.")]
Classes = Annotated[
    str | None, Option(metavar="FILE", help="Class names, one per line, in label order.")
]
Templates = Annotated[
    str | None, Option(metavar="FILE", help="Prompts, one per line, with {} for the name.")
]
TrainSplit = Annotated[
    str | None, Option(help="Split that probes train on. Default: train, else half the data.")
]
Shots = Annotated[
    int | None, Option(min=1, help="Images per class for the linear probe. Default: all.")
]
Neighbours = Annotated[
    int | None, Option("--k", min=1, help="Neighbours of the k-NN probe. Default: 20.")
]
Calibration = Annotated[
    str | None,
    Option(
        "--calibrate",
        metavar="SPLIT|FRACTION",
        help="Fit calibration.json on this split, or on this fraction of the images.",
    ),
]
Coverage = Annotated[
    float, Option(help="With --calibrate: how often a prediction set has the right class.")
]


@app.command(
    "eval", epilog="Example: leanclip eval --model runs/quickstart --data folder:data/shapes/unseen"
)
def evaluate(
    context: Context,
    model: Annotated[
        str, Option(help="A run folder, or weights (with -c if they lack an architecture).")
    ],
    data_spec: DataSpec = None,
    task: TaskName = None,
    split: Split = None,
    classes: Classes = None,
    templates: Templates = None,
    train_split: TrainSplit = None,
    shots: Shots = None,
    k: Neighbours = None,
    config: ConfigFile = None,
    overrides: Overrides = None,
    num_gpus: NumGpus = None,
    num_procs: NumProcs = 1,
    arch: Arch = None,
    tf32: Tf32 = False,
    out: Annotated[str | None, Option(help="Folder of the report. Default: runs/eval-...")] = None,
    calibration: Calibration = None,
    coverage: Coverage = 0.9,
) -> None:
    """Evaluate weights: zero-shot, retrieval, linear and k-NN probes.

    Writes report.html and report.json: metrics with 95% intervals, and how to reproduce them.
    """
    import shlex

    from leanclip.api import evaluate_only, summary
    from leanclip.cli.evaluation_config import EvalOptions, evaluation_config
    from leanclip.distributed.collectives import choose_device, join_group
    from leanclip.distributed.launch import join_launch

    launch_ranks(context.obj, count_ranks(num_gpus, num_procs), num_gpus)
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
    result = evaluate_only(
        settings, device, model, command, held_out=calibration, coverage=coverage
    )
    if result is not None:
        print(summary(result))


@app.command(
    epilog="Example: leanclip compare ViT-B-32.pt runs/food101 --data food101:data/food-101"
)
def compare(
    first: Annotated[str, Argument(metavar="A", help="Weights in any supported format.")],
    second: Annotated[str, Argument(metavar="B", help="Weights in any supported format.")],
    data_spec: DataSpec = None,
    task: TaskName = None,
    config: ConfigFile = None,
    overrides: Overrides = None,
    arch: Arch = None,
    num_gpus: OneGpu = None,
    tf32: Tf32 = False,
    out: Annotated[
        Path | None, Option(help="The folder to write. Default: runs/compare-A-B.")
    ] = None,
) -> None:
    """Evaluate two models on the same samples, and test whether they differ significantly.

    Writes compare.json and compare.html: metrics, and the samples that only one model gets right.
    """
    from leanclip.api import compare
    from leanclip.cli.evaluation_config import evaluation_config

    settings = evaluation_config(
        first, data_spec, task, config=config, arch=arch, overrides=overrides or ()
    )
    settings = settings.model_copy(update={"tf32": tf32 or settings.tf32})
    name = f"compare-{Path(first).name}-{Path(second).name}".replace("::", "-")
    out = out or Path("runs") / name
    text, written = compare(settings, first, second, out, arch=arch, num_gpus=num_gpus)
    print(text, *written, sep="\n")
