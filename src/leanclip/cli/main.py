"""The command line: parses, calls, prints. Heavy imports wait until a command needs them.

Results go to stdout; notes, warnings, errors and progress to stderr. A user's mistake is one
line and exit code 2; `--debug`, anywhere in the command, shows the traceback.
"""

import codecs
import io
import logging
import sys
import traceback
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from leanclip.cli import app as cli_app
from leanclip.cli import data as cli_data
from leanclip.cli import evaluate as cli_eval
from leanclip.cli import search as cli_search
from leanclip.cli import use as cli_use
from leanclip.cli.options import (
    Arch,
    ConfigFile,
    NumGpus,
    NumProcs,
    Overrides,
    Rows,
    count_ranks,
    launch_ranks,
)
from leanclip.distributed import is_rank, rank
from leanclip.distributed.launch import end_lost_rank, end_rank, join_launch, leave

if TYPE_CHECKING:
    from leanclip.config.schema import Config

log = logging.getLogger("leanclip")
app = typer.Typer(
    help="Train, fine-tune, evaluate and use CLIP. Start with: make quickstart",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
app.add_typer(cli_data.app, name="data")
app.add_typer(cli_search.app, name="search")
app.add_typer(cli_use.app)
app.add_typer(cli_eval.app)
app.add_typer(cli_app.app)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a command and exit: 0 done, 2 a user's mistake, 130 interrupted, 143 by SIGTERM."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    _show_log()
    warnings.filterwarnings("ignore", module="PIL")  # on damaged EXIF blocks, large images
    if isinstance(sys.stdout, io.TextIOWrapper):
        codecs.register_error("leanclip", _encode_anyway)
        sys.stdout.reconfigure(errors="leanclip")
    if not is_rank():
        _run(words)
        return
    try:
        _run(words)
    except SystemExit as end:
        end_rank(int(end.code or 0))
    except Exception as error:
        from leanclip.distributed.collectives import is_lost_rank

        if is_lost_rank(error) and "--debug" not in words:
            end_lost_rank()
        traceback.print_exc()
        end_rank(1)


def _encode_anyway(error: UnicodeError) -> tuple[str | bytes, int]:
    """Prints file names that are not UTF-8 as they are, and ? for what an encoding lacks (→)."""
    try:
        return codecs.lookup_error("surrogateescape")(error)
    except UnicodeError:
        return codecs.lookup_error("replace")(error)


def _run(words: list[str]) -> None:
    from leanclip.errors import LeanclipError

    debug = "--debug" in words
    try:
        app([word for word in _with_resume_value(words) if word != "--debug"], obj=words)
    except (LeanclipError, OSError) as error:
        if debug:
            raise
        leave(2, f"error: {' '.join(str(error).split())}")
    except MemoryError:
        if debug:
            raise
        leave(2, "error: there is not enough memory; give it more, or a smaller batch")
    except SystemExit as end:
        if end.code == 130 and not is_rank():  # Ctrl-C; for ranks the launcher speaks
            resumes = {
                "train": "; the same command goes on from the last checkpoint",
                "pack": "; the same command goes on at the shards that are not finished",
                "embed": "; the same command goes on at the shards that are not finished",
                "build": "; the same command goes on with what is not in the index",
                "update": "; the same command goes on with what is not in the index",
            }
            command = words[1] if words[0] in ("data", "search") else words[0]
            print(f"interrupted{resumes.get(command, '')}", file=sys.stderr)
        if end.code in (130, 143):
            leave(end.code)
        raise


@app.command(epilog="Example: leanclip train -c configs/quickstart.yaml -o train.epochs=2")
def train(
    context: typer.Context,
    config: ConfigFile = None,
    overrides: Overrides = None,
    num_gpus: NumGpus = None,
    num_procs: NumProcs = 1,
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
    from leanclip.config.schema import load_config
    from leanclip.distributed.preemption import nothing_to_save
    from leanclip.errors import ConfigError

    run = resume or None  # a bare --resume names no folder
    if config is None and run is None:
        raise ConfigError("-c: give a config file, for example -c configs/quickstart.yaml")
    if run and output_dir and Path(run) != Path(output_dir):
        raise ConfigError(f"--resume {run}: goes on in that folder; leave --output-dir out")
    ranks = count_ranks(num_gpus, num_procs)
    with nothing_to_save():
        join_launch()
        settings = load_config(
            config or Path(run or "") / "config.yaml",
            overrides or (),
            load=load,
            load_arch=arch,
            load_partial=partial or None,
            output_dir=run or output_dir,
            device="cpu" if num_procs > 1 else None,
        )
        if ranks == 1 or is_rank() or dry_run:
            _train(settings, num_gpus, ranks, resume is not None, dry_run, evaluate_only, load)
            return
    launch_ranks(context.obj, settings.device, num_gpus, ranks, max_restarts)


def _train(
    settings: "Config",
    num_gpus: int | None,
    ranks: int,
    must_resume: bool,
    dry_run: bool,
    evaluate_only: bool,
    load: str | None,
) -> None:
    """Train, or what is asked for in its place, as one of the ranks or alone."""
    from leanclip import api as outcomes
    from leanclip.distributed.collectives import choose_device, join_group
    from leanclip.distributed.preemption import Preempted
    from leanclip.training.plan import batch_warnings, describe, headline, make_plan

    device = choose_device(settings.device, num_gpus)
    join_group(device)
    if evaluate_only:
        outcome = outcomes.evaluate_only(settings, device, load)
        if outcome is not None:
            print(outcomes.summary(outcome))
        return
    plan = make_plan(settings, device, ranks=ranks)
    if dry_run:
        if rank() == 0:
            print(describe(plan))
        return
    log.info("%s", headline(plan))
    for warning in batch_warnings(plan):
        log.warning("%s", warning)
    try:
        outcome = outcomes.train(plan, must_resume=must_resume)
    except Preempted as stopped:
        if stopped.code != 130:  # of Ctrl-C `main` speaks
            log.info("%s; the same command goes on from its last checkpoint", stopped)
        raise SystemExit(stopped.code) from None
    if outcome is not None:
        print(outcomes.summary(outcome))


@app.command(epilog="Example: leanclip convert runs/quickstart quickstart-hf --to hf")
def convert(
    source: Annotated[str, typer.Argument(help="Weights of any format.")],
    destination: Annotated[Path, typer.Argument(help="The file or folder to write.")],
    to: Annotated[str, typer.Option(help="leanclip, openai, open_clip, hf or passl.")],
    arch: Arch = None,
) -> None:
    """Write weights in another system's format, to the bit."""
    from leanclip.weights import read_weights, write_weights

    weights = read_weights(source, arch=arch)
    write_weights(weights, destination, to)
    print(f"{weights.source} ({weights.format}) -> {destination} ({to})")


@app.command(epilog="Example: leanclip merge runs/big merged")
def merge(
    source: Annotated[Path, typer.Argument(help="A run's folder, or one of its checkpoints.")],
    destination: Annotated[Path, typer.Argument(help="The folder to write.")],
) -> None:
    """Write a checkpoint in shards (train.sharding fsdp) as a normal one, for every use."""
    from leanclip.training.checkpoint import merge as merge_shards

    print(f"{merge_shards(source, destination)} -> {destination}")


@app.command(epilog="Example: leanclip inspect runs/quickstart")
def inspect(
    source: Annotated[str, typer.Argument(help="Weights of any format.")],
    arch: Arch = None,
) -> None:
    """Say what a file or folder of weights is, without running anything in it."""
    from leanclip.weights import read_weights
    from leanclip.weights.inspection import inspection
    from leanclip.weights.weights import check_fits

    weights = read_weights(source, arch=arch)
    if arch is not None and weights.model is not None:
        check_fits(weights, weights.model)
    print(inspection(weights))


@app.command(epilog="Example: leanclip models | grep RN50")
def models() -> None:
    """List the named architectures with their sizes; JSON lines where stdout is not a terminal.

    GFLOPs are of one image and one caption of the whole context, forward; a multiply-add is two.
    """
    from rich.console import Console

    from leanclip.model.cost import summaries

    headings = ("model", "parameters (M)", "forward GFLOPs", "pixels", "activation")
    rows = Rows(*headings, numbers=range(1, 4), as_json=False)
    with Console(stderr=True).status("counting operations ..."):
        for summary in summaries():
            if rows.is_json:
                rows.add_json(summary)
            else:
                rows.add(*map(str, summary.values()))
    rows.end()


@app.command()
def doctor() -> None:
    """Show what is installed, what is missing, and how to get it."""
    from leanclip.cli.doctor import diagnose

    print(diagnose())


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
    log.setLevel(logging.INFO if rank() == 0 else logging.ERROR)
