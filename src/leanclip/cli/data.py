"""The commands under `leanclip data`: create, download, pack and check data sets."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from typer import Argument, Exit, Option, Typer

if TYPE_CHECKING:
    from leanclip.config.data import DataConfig
    from leanclip.config.schema import Config

app = Typer(help="Create, download, pack and check data sets.", no_args_is_help=True,
            rich_markup_mode=None)  # fmt: skip

DataSource = Annotated[str, Argument(metavar="SRC", help="FORMAT:ROOT, or a config file (.yaml).")]
DataOverrides = Annotated[
    list[str] | None,
    Option("-o", metavar="KEY=VALUE", help="Set one setting of `data` (repeatable)."),
]
Workers = Annotated[int | None, Option(min=0, help="Processes. Default: one per CPU core.")]

BatchSize = Annotated[
    int | None,
    Option(min=1, help="For false negatives. Default: that of the config, or 1024."),
]
MaxProblems = Annotated[float, Option(min=0, max=1, help="Maximum fraction of unusable samples.")]
MaxLeakage = Annotated[
    float | None,
    Option(
        min=0,
        max=1,
        help="Maximum fraction of a split's images found in another split. "
        "Default: 0 for exact, 0.01 for near-duplicates.",
    ),
]


@app.command(epilog="Example: leanclip data shapes data/shapes")
def shapes(
    root: Annotated[Path, Argument(help="The folder to write.")],
    seed: Annotated[int, Option(help="Random seed.")] = 0,
) -> None:
    """Draw the built-in data set of coloured, textured shapes (about 10,000 images)."""
    from leanclip.data.formats.shapes import draw_dataset
    from leanclip.io.progress import ProgressBar

    total = 0
    with ProgressBar("drawing", 1) as bar:
        for done, total in draw_dataset(root, seed=seed):
            bar.update(done, total=total)
    print(f"{total} drawings in {root}: train and val with captions, unseen by class")


@app.command(epilog="Example: leanclip data food101 data/food-101")
def food101(
    root: Annotated[Path, Argument(help="The folder to create.")] = Path("data/food-101"),
    archive: Annotated[
        Path | None, Option(help="A local food-101.tar.gz, instead of a download.")
    ] = None,
    url: Annotated[str | None, Option(help="Another download URL.")] = None,
    checksum: Annotated[
        str | None, Option(help="MD5 or SHA-256 of another archive; none: no check.")
    ] = None,
    keep_archive: Annotated[
        bool, Option("--keep-archive", help="Keep the downloaded archive.")
    ] = False,
) -> None:
    """Download and unpack Food-101 (5 GB; twice that while unpacking).

    Repeat the command to continue an interrupted download.
    """
    from leanclip.data.readers import food101_archive
    from leanclip.io.progress import ProgressBar

    with ProgressBar("", 1) as bar:
        is_new = food101_archive.get_food101(
            root,
            archive=archive,
            url=url or food101_archive.URL,
            checksum=None if checksum == "none" else checksum or food101_archive.MD5,
            keep_archive=keep_archive,
            progress=bar.update_bytes,
        )
    print(f"{root}: Food-101 {'is ready' if is_new else 'exists already'}")


@app.command(epilog="Example: leanclip data pack pairs:data/my-photos data/my-photos-packed")
def pack(
    source: DataSource,
    destination: Annotated[Path, Argument(metavar="DST", help="The folder to write.")],
    split: Annotated[str | None, Option(help="The split to pack. Default: train.")] = None,
    side: Annotated[
        int, Option(min=16, max=8192, help="Short side in pixels; smaller images keep their size.")
    ] = 256,
    quality: Annotated[int, Option(min=1, max=100, help="JPEG quality.")] = 90,
    shard_size: Annotated[int, Option(min=1, help="Samples per shard.")] = 1000,
    workers: Workers = None,
    seed: Annotated[int, Option(min=0, help="Seed of the shuffle.")] = 0,
    overrides: DataOverrides = None,
) -> None:
    """Write a data set as tar shards of resized, shuffled JPEGs, which train faster.

    Repeat the command to continue after an interruption.
    """
    from leanclip.data.tools.pack import pack, summary
    from leanclip.io.progress import ProgressBar

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
    print(summary(index, destination))


@app.command(epilog="Example: leanclip data check shapes:data/shapes")
def check(
    source: DataSource,
    splits: Annotated[
        list[str] | None, Option("--split", help="A split to check (repeatable). Default: all.")
    ] = None,
    batch_size: BatchSize = None,
    max_problems: MaxProblems = 0.01,
    max_leakage: MaxLeakage = None,
    workers: Workers = None,
    out: Annotated[
        Path | None, Option(help="Folder for check.json and pictures. Default: runs/check-...")
    ] = None,
    as_json: Annotated[bool, Option("--json", help="Print JSON.")] = False,
    overrides: DataOverrides = None,
) -> None:
    """Check all data before training: unusable, unusual, duplicate and leaked samples.

    The exit code is 1 if there are problems above the thresholds.
    """
    from leanclip.api import check_data
    from leanclip.report.data_check import check_text

    settings, config = _data_settings(source, overrides or ())
    out = out or Path("runs") / f"check-{Path(settings.root or source).stem}"
    findings, problems, written = check_data(
        settings,
        config,
        out,
        splits=splits or (),
        batch_size=batch_size,
        max_problems=max_problems,
        max_leakage=max_leakage,
        workers=workers,
    )
    text = (out / "check.json").read_text() if as_json else check_text(findings, problems)
    print(text.encode("utf-8", "replace").decode().rstrip("\n"))
    print(*written, sep="\n", file=sys.stderr if as_json else sys.stdout)
    if problems:
        raise Exit(1)


def _data_settings(source: str, overrides: Sequence[str]) -> "tuple[DataConfig, Config | None]":
    """The `data` section of FORMAT:ROOT or of a config file, and the config if it is one."""
    from leanclip.config.schema import load_config
    from leanclip.data import parse_source

    if Path(source).suffix in (".yaml", ".yml"):
        config = load_config(source, [f"data.{override}" for override in overrides])
        return config.data, config
    return parse_source(source, overrides), None
