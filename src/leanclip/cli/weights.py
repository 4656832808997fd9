"""The commands on weights: convert, export, interpolate, merge, inspect; and the presets."""

from pathlib import Path
from typing import Annotated

from typer import Argument, Option, Typer

from leanclip.cli.options import Arch, DataSpec, OneGpu, TaskName
from leanclip.cli.output import print_json, print_table, wants_json
from leanclip.errors import ConfigError

app = Typer(rich_markup_mode=None)

Source = Annotated[str, Argument(help="Weights in any supported format.")]
Out = Annotated[Path, Argument(metavar="OUT", help="The folder to write.")]

Alphas = Annotated[
    str | None,
    Option(metavar="0,0.1,...,1", help="Evaluate these alphas and write the best."),
]
Retention = Annotated[
    str | None,
    Option(metavar="FORMAT:ROOT", help="With --sweep: data for the retention benchmark."),
]
MaxDrop = Annotated[
    float | None,
    Option(
        min=0,
        max=1,
        help="With --sweep: how much the retention metric may drop, such as "
        "0.01. Default: maximise the mean of both metrics.",
    ),
]


@app.command(epilog="Example: leanclip convert runs/quickstart quickstart-hf --to hf")
def convert(
    source: Source,
    out: Annotated[Path, Argument(metavar="OUT", help="The file or folder to write.")],
    to: Annotated[str, Option(help="leanclip, openai, open_clip, hf or passl.")],
    arch: Arch = None,
) -> None:
    """Write weights in another format, bit-exactly."""
    from leanclip.weights import read_weights, write_weights

    weights = read_weights(source, arch=arch)
    write_weights(weights, out, to)
    print(f"{weights.source} ({weights.format}) -> {out} ({to})")


@app.command(epilog="Example: leanclip export runs/quickstart exported --to onnx")
def export(
    source: Source,
    out: Out,
    to: Annotated[str, Option(help="onnx, or torch (a torch.export program).")],
    int8: Annotated[
        bool, Option("--int8", help="Quantise ONNX weights to int8 and print the loss of accuracy.")
    ] = False,
    arch: Arch = None,
) -> None:
    """Export both encoders for other runtimes, and check their features against the model's."""
    from leanclip.inference.export import export, summary
    from leanclip.inference.load import load

    checks = export(load(source, arch=arch, device="cpu"), out, to, int8=int8)
    print(summary(out, checks))


@app.command(
    epilog="Example: leanclip interpolate ViT-B-32.pt runs/food101 --alpha 0.5 --out runs/between"
)
def interpolate(
    first: Annotated[str, Argument(help="Weights, for example before fine-tuning.")],
    second: Annotated[str, Argument(help="Weights, for example after fine-tuning.")],
    out: Annotated[Path, Option(help="The folder to write.")],
    alpha: Annotated[
        float | None, Option(min=0, max=1, help="The fraction of SECOND. Default: 0.5.")
    ] = None,
    sweep: Alphas = None,
    data_spec: DataSpec = None,
    retention: Retention = None,
    task: TaskName = None,
    max_drop: MaxDrop = None,
    arch: Arch = None,
    num_gpus: OneGpu = None,
) -> None:
    """Write (1 - alpha) * FIRST + alpha * SECOND, computed in float32.

    With --sweep, evaluate each alpha on --data and --retention (default: the data of SECOND's run)
    and write the best.
    """
    from leanclip.api import sweep_and_write
    from leanclip.cli.evaluation_config import evaluation_config
    from leanclip.errors import ConfigError
    from leanclip.weights import interpolate, read_weights, write_weights

    if sweep is not None:
        if alpha is not None:
            raise ConfigError("--alpha: cannot be combined with --sweep; remove one of them")
        own = evaluation_config(second, data_spec, task, arch=arch)
        other = evaluation_config(second, retention, arch=arch) if retention else None
        lines = sweep_and_write(
            own,
            other,
            first,
            second,
            sweep,
            out,
            max_drop=max_drop,
            arch=arch,
            num_gpus=num_gpus,
        )
        print(*lines, sep="\n")
        return
    for name, value in {"data": data_spec, "retention": retention, "max-drop": max_drop}.items():
        if value is not None:
            raise ConfigError(f"--{name}: needs --sweep, for example --sweep 0,0.1,...,1")
    weights = read_weights(first, arch=arch), read_weights(second, arch=arch)
    mixture = interpolate(*weights, 0.5 if alpha is None else alpha)
    write_weights(mixture, out, "leanclip", provenance=str(mixture.source))
    print(f"{mixture.source} -> {out}")


@app.command(epilog="Example: leanclip merge runs/big merged")
def merge(
    source: Annotated[Path, Argument(help="A run folder, or one of its checkpoints.")], out: Out
) -> None:
    """Merge a sharded checkpoint (train.sharding: fsdp) into a regular one."""
    from leanclip.training import checkpoint

    print(f"{checkpoint.merge(source, out)} -> {out}")


@app.command(epilog="Example: leanclip inspect runs/quickstart")
def inspect(source: Source, arch: Arch = None) -> None:
    """Describe weights: format, architecture, parameters. Nothing in the file is executed."""
    from leanclip.weights import read_weights
    from leanclip.weights.inspection import inspection
    from leanclip.weights.weights import check_fits

    weights = read_weights(source, arch=arch)
    if arch is not None and weights.model is not None:
        check_fits(weights, weights.model)
    print(inspection(weights))


@app.command(epilog="Example: leanclip models siglip2")
def models(
    word: Annotated[str, Argument(help="Only names, families and sources with this word.")] = "",
    cost: Annotated[
        bool,
        Option("--cost", help="Instead, the parameters and GFLOPs of each architecture (seconds)."),
    ] = False,
) -> None:
    """List what can be had by name, as JSON lines unless stdout is a terminal.

    A name with a source has weights, for --load, --model and leanclip.load. One without is an
    architecture, for --arch and for training from scratch. With --cost, GFLOPs are those of a
    forward pass over one image and one text of the full context length; a multiply-add counts as
    two operations.
    """
    if cost:
        from leanclip.model.cost import summaries

        headings = ("model", "parameters (M)", "forward GFLOPs", "pixels", "activation")
        rows, numbers = summaries(word), range(1, 4)
    else:
        from leanclip.config.catalogue import catalogue

        headings = ("family", "name", "source")
        rows, numbers = (entry._asdict() for entry in catalogue(word)), ()
    rows = list(rows)
    if not rows:
        from leanclip.config.catalogue import nearest_family

        raise ConfigError(
            f"models: no name has {word!r}{nearest_family(word)} (without a word all are listed)"
        )
    if wants_json():
        for row in rows:
            print_json(row)
        return
    print_table(headings, [list(map(str, row.values())) for row in rows], numbers=numbers)
