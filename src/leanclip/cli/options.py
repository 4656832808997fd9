"""What the commands share: options, which model is meant, how many ranks, and how rows are printed.

Tables for people on a terminal; JSON lines where stdout is not one, or with --json.
"""

import json
import logging
import sys
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from leanclip.distributed.launch import launch

if TYPE_CHECKING:
    import torch
    from rich.text import Text

    from leanclip.inference.model import InferenceModel

log = logging.getLogger("leanclip")

QUICKSTART = Path("runs/quickstart")  # of `make quickstart`

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
OneGpu = Annotated[
    int | None, typer.Option("--num-gpus", min=0, max=1, help="0: the CPU. Default: a GPU or CPU.")
]
NumProcs = Annotated[
    int, typer.Option("--num-procs", min=1, help="Processes on the CPU, in place of GPUs.")
]
Device = Annotated[str, typer.Option(help="auto, cpu or cuda.")]
Arch = Annotated[
    str | None,
    typer.Option(
        metavar="NAME|FILE",
        help="The architecture: a preset, or a JSON or YAML file, also open_clip's.",
    ),
]
Model = Annotated[
    str | None,
    typer.Option(
        help="A run's folder, a file or folder of weights, a published name (ViT-B/32) or a hub "
        "id; default: runs/quickstart, where there is one."
    ),
]
DataSpec = Annotated[
    str | None,
    typer.Option("--data", metavar="FORMAT:ROOT", help="What to measure on; else as a run did."),
]
TaskName = Annotated[
    str | None,
    typer.Option(
        "--task",
        help="zeroshot, retrieval, linear-probe, knn or all; default: of zeroshot and retrieval "
        "what the data allows.",
    ),
]
BatchSize = Annotated[int, typer.Option(min=1, help="The most images of a forward pass.")]
Decoders = Annotated[
    int | None,
    typer.Option("--workers", min=0, help="Threads that decode; default: one per CPU core."),
]
MaxBadFraction = Annotated[
    float, typer.Option(min=0, max=1, help="Share of images that may be unreadable.")
]
Tf32 = Annotated[
    bool, typer.Option("--tf32", help="Let a GPU compute float32 in TF32: faster, less exact.")
]
Truncate = Annotated[
    bool, typer.Option("--truncate", help="Cut texts that are over the model's context.")
]
Plot = Annotated[Path | None, typer.Option(help="Draw it too: a .png or .svg file.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON lines on a terminal too.")]


def load_model(
    model: str | None,
    device: "str | torch.device",
    *,
    arch: str | None = None,
) -> "InferenceModel":
    """The model that is meant, loaded.

    Raises:
        ConfigError: none is named, and there is none.
        WeightsError: it cannot be loaded.
    """
    from leanclip.inference.load import load

    return load(find_model(model), arch=arch, device=device)


def has_quickstart() -> bool:
    """Whether `make quickstart` has trained a model here."""
    return (QUICKSTART / "checkpoints").is_dir()


def find_model(model: str | None) -> str:
    """The model that is meant where none is named.

    Raises:
        ConfigError: there is none.
    """
    from leanclip.errors import ConfigError

    if model is None:
        if not has_quickstart():
            raise ConfigError(
                "--model: say which: a run's folder, a file or folder of weights, a published "
                "name (ViT-B/32) or a hub id; without it, what `make quickstart` trained is used, "
                f"and there is no {QUICKSTART}"
            )
        model = str(QUICKSTART)
        log.info("model: %s (another with --model)", model)
    return model


def count_ranks(num_gpus: int | None, num_procs: int) -> int:
    """How many processes are asked for."""
    from leanclip.errors import ConfigError

    if num_procs > 1 and num_gpus:
        raise ConfigError(
            f"--num-procs {num_procs}: are processes on the CPU; leave --num-gpus out"
        )
    return max(num_gpus or 1, num_procs)


def launch_ranks(
    words: list[str], device: str, num_gpus: int | None, ranks: int, max_restarts: int = 0
) -> NoReturn:
    """The same command in several processes, and its exit code."""
    if num_gpus:
        from leanclip.distributed.collectives import choose_device

        choose_device(device, num_gpus)  # one word here, not one of each rank
    raise SystemExit(launch(words, ranks=ranks, max_restarts=max_restarts))


def is_json(as_json: bool) -> bool:
    """Whether lines of JSON are printed: they are wanted, or nobody watches."""
    return as_json or not sys.stdout.isatty()


class Rows:
    """Rows of a table for a terminal, printed at the end, or JSON lines, printed at once.

    Args:
        headings: of the columns.
        numbers: the columns that are set to the right.
        as_json: print JSON on a terminal too.
    """

    def __init__(self, *headings: str, numbers: Collection[int], as_json: bool) -> None:
        self.is_json = is_json(as_json)
        self.headings, self.numbers = headings, numbers
        self.rows: list[tuple[str | Text, ...]] = []

    def add(self, *cells: "str | Text") -> None:
        """A row of the table."""
        self.rows.append(cells)

    def add_json(self, facts: dict[str, Any]) -> None:
        """A line."""
        line = json.dumps(facts, ensure_ascii=False)
        try:
            line.encode()
        except UnicodeEncodeError:  # a name that is not UTF-8
            line = json.dumps(facts)
        print(line, flush=True)

    def end(self) -> None:
        """Print the table."""
        if self.is_json:
            return
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text

        table = Table()
        for number, heading in enumerate(self.headings):
            side = "right" if number in self.numbers else "left"
            table.add_column(Text(heading, overflow="fold"), justify=side, overflow="fold")
        for row in self.rows:  # a Text, for brackets are no markup
            table.add_row(*(Text(sanitize(one)) if isinstance(one, str) else one for one in row))
        Console().print(table)


def sanitize(text: str) -> str:
    """What a terminal can show: no controls, and nothing that is not UTF-8."""
    return "".join(c if c.isprintable() else "?" for c in text)
