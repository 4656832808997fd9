"""Options that several commands share, the default model, and starting several processes."""

import logging
from pathlib import Path
from typing import Annotated

from typer import Option

from leanclip.distributed import is_rank
from leanclip.distributed.launch import launch

log = logging.getLogger("leanclip")

QUICKSTART = Path("runs/quickstart")  # written by `make quickstart`

ConfigFile = Annotated[Path | None, Option("--config", "-c", help="YAML configuration file.")]
Overrides = Annotated[
    list[str] | None, Option("-o", metavar="KEY.PATH=VALUE", help="Set one setting (repeatable).")
]
NumGpus = Annotated[
    int | None,
    Option(min=0, help="GPUs of this machine; 0 is the CPU. Default: one GPU, else the CPU."),
]
OneGpu = Annotated[
    int | None, Option("--num-gpus", min=0, max=1, help="0 is the CPU. Default: a GPU, else it.")
]
NumProcs = Annotated[int, Option(min=1, help="CPU processes, instead of GPUs.")]
Device = Annotated[str, Option(help="auto, cpu or cuda.")]
Weights = "A run folder, a weights file or folder, a published name (ViT-B/32) or a hub id"
Model = Annotated[str | None, Option(help=f"{Weights}. Default: {QUICKSTART}, if it exists.")]
Arch = Annotated[
    str | None,
    Option(metavar="NAME|FILE", help="Architecture: a preset, or a JSON (also open_clip's) or YAML "
           "file."),
]  # fmt: skip
DataSpec = Annotated[
    str | None,
    Option("--data", metavar="FORMAT:ROOT", help="Evaluation data. Default: the run's."),
]
TaskName = Annotated[
    str | None,
    Option("--task", help="zeroshot, retrieval, linear-probe, knn or all. Default: zeroshot and "
           "retrieval, if the data allows."),
]  # fmt: skip
BatchSize = Annotated[int, Option(min=1, help="Maximum images per forward pass.")]
Decoders = Annotated[
    int | None, Option("--workers", min=0, help="Decoding threads. Default: one per CPU core.")
]
MaxBadFraction = Annotated[
    float, Option(min=0, max=1, help="Maximum fraction of unreadable images.")
]
Tf32 = Annotated[bool, Option("--tf32", help="Allow TF32 on a GPU: faster, less exact.")]
Truncate = Annotated[bool, Option("--truncate", help="Truncate texts to the context length.")]
Plot = Annotated[Path | None, Option(help="Also draw the result to a .png or .svg file.")]
AsJson = Annotated[bool, Option("--json", help="Print JSON lines even to a terminal.")]


def find_model(model: str | None) -> str:
    """The given model, or the one that `make quickstart` trained.

    Raises:
        ConfigError: none is given, and the quickstart has not been run here.
    """
    from leanclip.errors import ConfigError

    if model is not None:
        return model
    if not (QUICKSTART / "checkpoints").is_dir():
        raise ConfigError(
            f"--model: give a{Weights[1:]}; the default, {QUICKSTART}, does not exist "
            "(create it with: make quickstart)"
        )
    log.info("using %s; choose another model with --model", QUICKSTART)
    return str(QUICKSTART)


def count_ranks(num_gpus: int | None, num_procs: int) -> int:
    """The number of processes to run.

    Raises:
        ConfigError: CPU processes are combined with GPUs.
    """
    from leanclip.errors import ConfigError

    if num_procs > 1 and num_gpus:
        raise ConfigError(f"--num-procs {num_procs}: starts CPU processes; remove --num-gpus")
    return max(num_gpus or 1, num_procs)


def launch_ranks(
    words: list[str],
    ranks: int,
    num_gpus: int | None,
    *,
    device: str = "auto",
    max_restarts: int = 0,
) -> None:
    """Run the command `words` in `ranks` processes and exit; return if this is one of them.

    Raises:
        ConfigError: the GPUs are not available.
        SystemExit: with the job's exit code.
    """
    if ranks == 1 or is_rank():
        return
    if num_gpus:
        from leanclip.distributed.collectives import choose_device

        choose_device(device, num_gpus)  # one error here, not one per rank
    raise SystemExit(launch(words, ranks=ranks, max_restarts=max_restarts))
