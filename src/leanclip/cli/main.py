"""The command line: parses arguments, calls, prints. A command imports what it needs when it runs.

Results go to stdout; logs, warnings, errors and progress to stderr. A user's mistake is one line
and exit code 2; with `--debug`, anywhere in the command, also a traceback.
"""

import codecs
import io
import logging
import sys
import traceback
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

from typer import Context, Option, Typer

from leanclip.cli import app as cli_app
from leanclip.cli import data, evaluate, search, use, weights
from leanclip.cli.options import (
    Arch,
    ConfigFile,
    NumGpus,
    NumProcs,
    Overrides,
    count_ranks,
    launch_ranks,
)
from leanclip.distributed import is_rank, rank
from leanclip.distributed.launch import end_lost_rank, end_rank, join_launch, leave

log = logging.getLogger("leanclip")
app = Typer(
    help="Train, fine-tune, evaluate and use CLIP. To get started: make quickstart",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
RESUMABLE = ("train", "embed", "pack", "build", "update")  # commands

MaxRestarts = Annotated[
    int, Option(min=0, help="Restarts from the last checkpoint after a process has died.")
]
InitialWeights = Annotated[str | None, Option(help="Initial weights, with a new optimiser state.")]
Partial = Annotated[
    bool, Option("--partial", help="With --load: allow missing and unexpected keys.")
]
Resume = Annotated[
    str | None, Option(metavar="[RUN_DIR]", help="Resume a run (an error without a checkpoint).")
]
OutputDir = Annotated[
    str | None, Option(help="The run folder. Default: runs/ and the config's name.")
]
DryRun = Annotated[bool, Option("--dry-run", help="Print the plan and exit.")]
EvaluateOnly = Annotated[bool, Option("--evaluate-only", help="Evaluate the weights, no training.")]


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a command and exit: 0 success, 2 a user's mistake, 130 interrupted, 143 SIGTERM."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    _log_to_stderr()
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
    """Keep the bytes of file names that are not UTF-8; print ? for what an encoding lacks (→)."""
    try:
        return codecs.lookup_error("surrogateescape")(error)
    except UnicodeError:
        return codecs.lookup_error("replace")(error)


def _run(words: list[str]) -> None:
    from leanclip.distributed.preemption import Preempted
    from leanclip.errors import LeanclipError

    try:
        app([word for word in _with_resume_value(words) if word != "--debug"], obj=words)
    except (LeanclipError, OSError, MemoryError) as error:
        if "--debug" in words:
            raise
        is_memory = isinstance(error, MemoryError)
        message = "out of memory; reduce the batch size" if is_memory else str(error)
        leave(2, f"error: {' '.join(message.split())}")
    except (SystemExit, Preempted) as end:
        can_resume = any(word in RESUMABLE for word in words[:2])
        advice = "; run the same command again to continue" if can_resume else ""
        if end.code == 130 and not is_rank():  # Ctrl-C; the launcher reports it for its ranks
            print(f"interrupted{advice}", file=sys.stderr)
        elif end.code == 143 and isinstance(end, Preempted):
            log.info("%s%s", end, advice)
        # A rank that training did not stop may be ended by the launcher because another has died.
        if end.code in (130, 143) and (isinstance(end, Preempted) or not is_rank()):
            leave(end.code)
        raise


@app.command(epilog="Example: leanclip train -c configs/quickstart.yaml -o train.epochs=2")
def train(
    context: Context,
    config: ConfigFile = None,
    overrides: Overrides = None,
    num_gpus: NumGpus = None,
    num_procs: NumProcs = 1,
    max_restarts: MaxRestarts = 0,
    load: InitialWeights = None,
    arch: Arch = None,
    partial: Partial = False,
    resume: Resume = None,
    output_dir: OutputDir = None,
    dry_run: DryRun = False,
    evaluate_only: EvaluateOnly = False,
) -> None:
    """Train a model, or resume a run, then evaluate it.

    A run whose folder has a checkpoint is resumed from the newest one. Otherwise training starts
    from --load, or from scratch.
    """
    from leanclip.config.schema import load_config
    from leanclip.distributed.preemption import deferred_signals, nothing_to_save
    from leanclip.errors import ConfigError

    run = resume or None  # a bare --resume names no folder
    if config is None and run is None:
        raise ConfigError("-c: give a config file, for example -c configs/quickstart.yaml")
    if run and output_dir and Path(run) != Path(output_dir):
        raise ConfigError(f"--resume {run}: resumes in that folder; remove --output-dir")
    ranks = count_ranks(num_gpus, num_procs)
    with nothing_to_save():
        join_launch()
        settings = load_config(
            config or Path(run or "") / "config.yaml",
            overrides or (),
            architecture_of=_stored_architecture,
            load=load,
            load_arch=arch,
            load_partial=partial or None,
            output_dir=run or output_dir,
            device="cpu" if num_procs > 1 else None,
        )
        with deferred_signals():
            import torch  # noqa: F401
        if not dry_run:
            launch_ranks(
                context.obj, ranks, num_gpus, device=settings.device, max_restarts=max_restarts
            )
        from leanclip.api import run_training

        text = run_training(
            settings,
            num_gpus=num_gpus,
            ranks=ranks,
            must_resume=resume is not None,
            dry_run=dry_run,
            only_evaluate=evaluate_only,
            source=load,
        )
        if text is not None:
            print(text)


@app.command(epilog="Example: leanclip doctor")
def doctor() -> None:
    """Show which dependencies are installed, and how to install missing ones."""
    from leanclip.cli.doctor import diagnose

    print(diagnose())


app.add_typer(evaluate.app)
app.add_typer(use.app)
app.add_typer(weights.app)
app.add_typer(data.app, name="data")
app.add_typer(search.app, name="search")
app.add_typer(cli_app.app)


def _stored_architecture(source: str, arch: str | None) -> dict[str, Any]:
    from leanclip.weights import stored_architecture

    return stored_architecture(source, arch)


def _with_resume_value(words: list[str]) -> list[str]:
    """Give a bare `--resume` an empty value, as Typer has no options with an optional value."""
    bare = [
        word == "--resume" and (i + 1 == len(words) or words[i + 1].startswith("-"))
        for i, word in enumerate(words)
    ]
    return [f"{word}=" if is_bare else word for word, is_bare in zip(words, bare, strict=True)]


def _log_to_stderr() -> None:
    """Log plain lines to the current stderr."""

    class ToStderr(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            prefix = "warning: " if record.levelno >= logging.WARNING else ""
            print(prefix + record.getMessage(), file=sys.stderr)

    log.handlers = [ToStderr()]
    log.setLevel(logging.INFO if rank() == 0 else logging.ERROR)
