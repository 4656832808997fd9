"""The command line: parses, calls, prints. Heavy imports wait until a command needs them.

Results go to stdout; notes, warnings, errors and progress to stderr. A user's mistake is one
line and exit code 2; `--debug`, anywhere in the command, shows the traceback.
"""

import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from leanclip.launch import is_rank, join_launch, launch, leave_launch

if TYPE_CHECKING:
    from leanclip.config import Config, DataConfig

log = logging.getLogger("leanclip")
app = typer.Typer(
    help="Train, fine-tune, evaluate and use CLIP. Start with: make quickstart",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
data = typer.Typer(help="Make and look at data sets.", no_args_is_help=True, rich_markup_mode=None)
app.add_typer(data, name="data")

ConfigFile = Annotated[Path | None, typer.Option("--config", "-c", help="YAML file of settings.")]
Overrides = Annotated[
    list[str] | None,
    typer.Option("-o", metavar="KEY.PATH=VALUE", help="Set one setting; may be repeated."),
]
NumGpus = Annotated[
    int | None,
    typer.Option(
        "--num-gpus", min=0, help="GPUs of this machine; 0: the CPU. Default: one or CPU."
    ),
]
DataSource = Annotated[
    str, typer.Argument(metavar="SRC", help="LAYOUT:ROOT, or a config file (.yaml).")
]
DataOverrides = Annotated[
    list[str] | None,
    typer.Option("-o", metavar="KEY=VALUE", help="Set one setting of data; may be repeated."),
]
Workers = Annotated[int | None, typer.Option(min=0, help="Processes; default: one per CPU core.")]
Arch = Annotated[
    str | None,
    typer.Option(metavar="NAME|FILE", help="The architecture: a preset, or a JSON or YAML file."),
]


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a command and exit: 0 done, 2 a user's mistake, 130 interrupted, 143 by SIGTERM."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in words
    _show_log()
    join_launch()
    from leanclip.errors import LeanclipError

    try:
        app([word for word in _with_resume_value(words) if word != "--debug"], obj=words)
    except (LeanclipError, OSError) as error:
        if debug:
            raise
        leave_launch(2)
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
    except SystemExit as end:
        if end.code == 130:  # Typer's for Ctrl-C
            resumes = {
                "train": "; the same command goes on from the last checkpoint",
                "pack": "; the same command goes on at the shards that are not finished",
            }
            command = words[1] if words[0] == "data" else words[0]
            print(f"interrupted{resumes.get(command, '')}", file=sys.stderr)
        raise


@app.command(epilog="Example: leanclip train -c configs/quickstart.yaml -o train.epochs=2")
def train(
    context: typer.Context,
    config: ConfigFile = None,
    overrides: Overrides = None,
    num_gpus: NumGpus = None,
    num_procs: Annotated[
        int, typer.Option(min=1, help="Processes on the CPU, in place of GPUs.")
    ] = 1,
    max_restarts: Annotated[
        int, typer.Option(min=0, help="Start again from the last checkpoint when a rank dies.")
    ] = 0,
    load: Annotated[
        str | None, typer.Option(help="Weights to start from, with a fresh optimiser.")
    ] = None,
    arch: Arch = None,
    partial: Annotated[
        bool, typer.Option("--partial", help="With --load: list keys that do not match, go on.")
    ] = False,
    resume: Annotated[
        str | None,
        typer.Option(
            metavar="[RUN_DIR]", help="Go on with a run; there must be a checkpoint to go on from."
        ),
    ] = None,
    output_dir: Annotated[
        str | None, typer.Option(help="The run's folder; default: runs/ and the config's name.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show what would be done, and stop.")
    ] = False,
    evaluate_only: Annotated[
        bool, typer.Option("--evaluate-only", help="Measure the weights, without training.")
    ] = False,
) -> None:
    """Train CLIP, or go on with a run, then evaluate it.

    The same command in the same output folder goes on from the newest checkpoint. What a run
    starts from, in this order: a run in the output folder, --resume, --load, scratch.
    """
    from leanclip import train as training
    from leanclip.config import load_config
    from leanclip.distributed import choose_device, process_group
    from leanclip.errors import ConfigError
    from leanclip.plan import describe, headline, make_plan
    from leanclip.stopping import Stopped

    run = resume or None  # a bare --resume names no folder
    if config is None and run is None:
        raise ConfigError("-c: give a config file, for example -c configs/quickstart.yaml")
    settings = load_config(
        config or Path(run or "") / "config.yaml",
        overrides or (),
        load=load,
        load_arch=arch,
        load_partial=partial or None,
        output_dir=run or output_dir,
    )
    if num_procs > 1 and num_gpus:
        raise ConfigError(
            f"--num-procs {num_procs}: are processes on the CPU; leave --num-gpus out"
        )
    device = choose_device("cpu" if num_procs > 1 else settings.device, num_gpus)
    if evaluate_only:
        print(training.summary(training.evaluate_only(settings, device, load)))
        return
    ranks = max(num_gpus or 1, num_procs)
    if ranks > 1 and not is_rank() and not dry_run:
        raise SystemExit(launch(context.obj, ranks=ranks, max_restarts=max_restarts))
    with process_group(device):
        plan = make_plan(settings, device, ranks=ranks)
        if dry_run:
            print(describe(plan))
            return
        log.info("%s", headline(plan))
        try:
            outcome = training.train(plan, must_resume=resume is not None)
        except Stopped as stopped:
            log.info("%s; the same command goes on from the checkpoint in %s", stopped, plan.folder)
            raise SystemExit(leave_launch(stopped.code)) from None
    if outcome is not None:
        print(training.summary(outcome))


@app.command(
    name="eval",
    epilog="Example: leanclip eval --model runs/quickstart --data folder:data/shapes/unseen",
)
def evaluate(
    model: Annotated[
        str, typer.Option(help="A run's folder, a folder of weights, or a file (then with -c).")
    ],
    data_spec: Annotated[
        str | None,
        typer.Option("--data", metavar="LAYOUT:ROOT", help="What to evaluate on; else as -c says."),
    ] = None,
    task: Annotated[str, typer.Option(help="zeroshot, retrieval or all.")] = "all",
    config: ConfigFile = None,
    overrides: Overrides = None,
    num_gpus: NumGpus = None,
    arch: Arch = None,
    out: Annotated[
        str | None, typer.Option(help="Where to write evaluation.json and pictures.")
    ] = None,
) -> None:
    """Evaluate weights: zero-shot top-1/top-5, and recall@1/5/10 both ways."""
    from leanclip import train as training
    from leanclip.distributed import choose_device
    from leanclip.evaluate import evaluation_config

    settings = evaluation_config(
        model, data_spec, task, config=config, arch=arch, overrides=overrides or (), out=out
    )
    device = choose_device(settings.device, num_gpus)
    print(training.summary(training.evaluate_only(settings, device, model)))


@data.command(epilog="Example: leanclip data shapes data/shapes")
def shapes(
    root: Annotated[Path, typer.Argument(help="The folder to draw into.")],
    seed: Annotated[int, typer.Option(help="Another seed draws other pictures.")] = 0,
) -> None:
    """Draw the built-in data set of coloured, textured figures (about 10,000 images)."""
    from leanclip.data.shapes import draw_dataset
    from leanclip.tracking import ProgressBar

    done, total = 0, 1
    with ProgressBar("drawing", total) as bar:
        for done, total in draw_dataset(root, seed=seed):
            bar.update(done, total=total)
    print(f"{total} drawings in {root}: train and val with captions, unseen by class")


@data.command(epilog="Example: leanclip data food101 data/food-101")
def food101(
    root: Annotated[Path, typer.Argument(help="The folder to make.")] = Path("data/food-101"),
    archive: Annotated[
        Path | None, typer.Option(help="A copy of food-101.tar.gz, in place of a download.")
    ] = None,
    url: Annotated[str | None, typer.Option(help="Where to download it; default: its own.")] = None,
    checksum: Annotated[
        str | None, typer.Option(help="MD5 or SHA-256 of another archive; none: do not check.")
    ] = None,
    keep_archive: Annotated[
        bool, typer.Option("--keep-archive", help="Do not remove the archive that was downloaded.")
    ] = False,
) -> None:
    """Download Food-101 and unpack it (5 GB, twice that while it is unpacked).

    The same command goes on where it was interrupted.
    """
    from leanclip.data import food101_archive
    from leanclip.tracking import ProgressBar

    with ProgressBar("", 1) as bar:
        is_new = food101_archive.get_food101(
            root,
            archive=archive,
            url=url or food101_archive.URL,
            checksum=None if checksum == "none" else checksum or food101_archive.MD5,
            keep_archive=keep_archive,
            progress=bar.update_bytes,
        )
    print(f"{root}: Food-101 {'is ready' if is_new else 'is there already, and was left alone'}")


@data.command(
    name="pack", epilog="Example: leanclip data pack pairs:data/my-photos data/my-photos-packed"
)
def pack_(
    source: DataSource,
    destination: Annotated[Path, typer.Argument(metavar="DST", help="The folder to write.")],
    split: Annotated[str | None, typer.Option(help="The part of the data to pack.")] = None,
    side: Annotated[
        int, typer.Option(min=16, max=8192, help="Short side in pixels; none is enlarged.")
    ] = 256,
    quality: Annotated[int, typer.Option(min=1, max=100, help="Of the JPEGs.")] = 90,
    shard_size: Annotated[int, typer.Option(min=1, help="Samples of a shard.")] = 1000,
    workers: Workers = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the order.")] = 0,
    overrides: DataOverrides = None,
) -> None:
    """Write any source as shards of small, shuffled JPEGs, from which training is fast.

    The same command goes on where an earlier one was interrupted.
    """
    from leanclip.data.pack import pack, summary
    from leanclip.tracking import ProgressBar

    settings, _ = _data_settings(source, overrides or ())
    if split is not None:
        settings = settings.model_copy(update={"split": split})
    with ProgressBar("packing", 1) as bar:
        index = pack(
            settings,
            destination,
            side=side,
            quality=quality,
            shard_size=shard_size,
            seed=seed,
            workers=workers,
            progress=lambda done, total: bar.update(done, total=total),
        )
    print(summary(index, destination, settings.templates or ()))


@data.command(name="check", epilog="Example: leanclip data check shapes:data/shapes")
def check_(
    source: DataSource,
    splits: Annotated[
        list[str] | None, typer.Option("--split", help="A part to check; may be repeated.")
    ] = None,
    batch_size: Annotated[
        int | None,
        typer.Option(min=1, help="For false negatives; default: the config's, or 1024."),
    ] = None,
    max_problems: Annotated[
        float, typer.Option(min=0, max=1, help="Share of samples that may be unusable.")
    ] = 0.01,
    max_leakage: Annotated[
        float | None,
        typer.Option(
            min=0,
            max=1,
            help="Share of a split's images that may be in another; default: 0, and 0.01 nearly.",
        ),
    ] = None,
    workers: Workers = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder of check.json and pictures; default: runs/check-…")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    overrides: DataOverrides = None,
) -> None:
    """Look at all the data before training: unusable, odd, duplicate, leaked.

    Exit code 1 where there are problems above the thresholds.
    """
    import json

    from leanclip.data.check import examples, open_parts, read_parts
    from leanclip.data.check_text import check_text
    from leanclip.data.findings import find, paired_images
    from leanclip.evaluate.tasks import evaluation_data
    from leanclip.plots import check_pictures
    from leanclip.tracking import ProgressBar, write_text

    settings, config = _data_settings(source, overrides or ())
    more = evaluation_data(config) if config and not splits else []
    parts = open_parts([settings, *more], splits or ())
    with ProgressBar("reading", sum(len(part.dataset) for part in parts)) as bar:
        read_parts(parts, workers=workers, progress=lambda done, total: bar.update(done))
    findings = find(
        parts,
        batch_size=batch_size or (config.train.batch_size if config else 1024),
        context_length=config.model.context_length if config else 77,
        max_problems=max_problems,
        max_leakage=max_leakage,
    )
    if out is None:
        out = Path("runs") / f"check-{Path(settings.root or source).stem}"
    out.mkdir(parents=True, exist_ok=True)
    text = json.dumps(findings.to_plain(), indent=2, ensure_ascii=False)
    write_text(out / "check.json", text + "\n")
    drawn = check_pictures(out, examples(parts), paired_images(parts, findings))
    print(text if as_json else check_text(findings))
    for path in (out / "check.json", *drawn):
        print(path, file=sys.stderr if as_json else sys.stdout)
    if findings.problems:
        sys.exit(1)


@app.command(epilog="Example: leanclip convert runs/quickstart quickstart-hf --to hf")
def convert(
    source: Annotated[str, typer.Argument(help="Weights of any dialect.")],
    destination: Annotated[Path, typer.Argument(help="The file or folder to write.")],
    to: Annotated[str, typer.Option(help="leanclip, openai, open_clip, hf or passl.")],
    arch: Arch = None,
) -> None:
    """Write weights in another system's format, to the bit."""
    from leanclip.weights import read_weights, write_weights

    weights = read_weights(source, arch=arch)
    write_weights(weights, destination, to)
    print(f"{weights.source} ({weights.dialect}) -> {destination} ({to})")


@app.command(epilog="Example: leanclip inspect runs/quickstart")
def inspect(
    source: Annotated[str, typer.Argument(help="Weights of any dialect.")],
    arch: Arch = None,
) -> None:
    """Say what a file or folder of weights is, without running anything in it."""
    from leanclip.weights import read_weights
    from leanclip.weights.inspection import inspection

    print(inspection(read_weights(source, arch=arch)))


@app.command(epilog="Example: leanclip models | grep RN50")
def models() -> None:
    """List the named architectures with their sizes; JSON lines where stdout is not a terminal.

    GFLOPs are of one image and one caption of the whole context, forward; a multiply-add is two.
    """
    import json

    from leanclip.model.presets import summaries

    if not sys.stdout.isatty():
        for summary in summaries():
            print(json.dumps(summary))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table("model")
    for heading in ("parameters (M)", "forward GFLOPs", "pixels", "activation"):
        table.add_column(heading, justify="left" if heading == "activation" else "right")
    console = Console()
    with console.status("counting operations ..."):
        for summary in summaries():
            table.add_row(*(str(value) for value in summary.values()))
    console.print(table)


@app.command()
def doctor() -> None:
    """Show what is installed, what is missing, and how to get it."""
    from leanclip.doctor import diagnose

    print(diagnose())


def _data_settings(source: str, overrides: Sequence[str]) -> "tuple[DataConfig, Config | None]":
    """The `data` section of LAYOUT:ROOT or of a config file, and the config if it is one."""
    from leanclip.config import load_config
    from leanclip.data import parse_source

    if Path(source).suffix in (".yaml", ".yml"):
        config = load_config(source, [f"data.{override}" for override in overrides])
        return config.data, config
    return parse_source(source, overrides), None


def _with_resume_value(words: list[str]) -> list[str]:
    """Give a bare `--resume` the empty value that an option without optional values needs."""
    bare = [
        word == "--resume" and (i + 1 == len(words) or words[i + 1].startswith("-"))
        for i, word in enumerate(words)
    ]
    return [f"{word}=" if is_bare else word for word, is_bare in zip(words, bare, strict=True)]


def _show_log() -> None:
    """Print leanclip's notes and warnings as plain lines to whatever stderr is at the time."""

    class ToStderr(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            prefix = "warning: " if record.levelno >= logging.WARNING else ""
            print(prefix + record.getMessage(), file=sys.stderr)

    log.handlers = [ToStderr()]
    log.setLevel(logging.INFO if os.environ.get("RANK", "0") == "0" else logging.ERROR)
