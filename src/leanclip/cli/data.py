"""The commands under `leanclip data`: make, fetch, pack and check data sets."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from leanclip.config.data import DataConfig
    from leanclip.config.schema import Config

app = typer.Typer(help="Make and look at data sets.", no_args_is_help=True, rich_markup_mode=None)

DataSource = Annotated[
    str, typer.Argument(metavar="SRC", help="FORMAT:ROOT, or a config file (.yaml).")
]
DataOverrides = Annotated[
    list[str] | None,
    typer.Option("-o", metavar="KEY=VALUE", help="Set one setting of data; may be repeated."),
]
Workers = Annotated[int | None, typer.Option(min=0, help="Processes; default: one per CPU core.")]


@app.command(epilog="Example: leanclip data shapes data/shapes")
def shapes(
    root: Annotated[Path, typer.Argument(help="The folder to draw into.")],
    seed: Annotated[int, typer.Option(help="Another seed draws other pictures.")] = 0,
) -> None:
    """Draw the built-in data set of coloured, textured figures (about 10,000 images)."""
    from leanclip.data.formats.shapes import draw_dataset
    from leanclip.io.progress import ProgressBar

    done, total = 0, 1
    with ProgressBar("drawing", total) as bar:
        for done, total in draw_dataset(root, seed=seed):
            bar.update(done, total=total)
    print(f"{total} drawings in {root}: train and val with captions, unseen by class")


@app.command(epilog="Example: leanclip data food101 data/food-101")
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
    print(f"{root}: Food-101 {'is ready' if is_new else 'is there already, and was left alone'}")


@app.command(
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


@app.command(name="check", epilog="Example: leanclip data check shapes:data/shapes")
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

    from leanclip.data.tools.check import examples, open_parts, read_parts
    from leanclip.data.tools.findings import find, paired_images
    from leanclip.evaluation.tasks import evaluation_data
    from leanclip.io.files import write_text
    from leanclip.io.progress import ProgressBar
    from leanclip.report.data_check import check_text, problems
    from leanclip.report.plots import check_pictures

    settings, config = _data_settings(source, overrides or ())
    more = evaluation_data(config.data, config.evaluate) if config and not splits else []
    parts = open_parts([settings, *more], splits or ())
    with ProgressBar("reading", sum(len(part.dataset) for part in parts)) as bar:
        read_parts(parts, workers=workers, progress=lambda done, total: bar.update(done))
    findings = find(
        parts,
        batch_size=batch_size or (config.train.batch_size if config else 1024),
        context_length=config.model.context_length if config else 77,
    )
    over = problems(findings.values, max_problems=max_problems, max_leakage=max_leakage)
    if out is None:
        out = Path("runs") / f"check-{Path(settings.root or source).stem}"
    out.mkdir(parents=True, exist_ok=True)
    text = json.dumps(findings.values | {"problems": over}, indent=2)
    write_text(out / "check.json", text + "\n")
    drawn = check_pictures(out, examples(parts), paired_images(parts, findings))
    print(
        text if as_json else check_text(findings.values, over).encode("utf-8", "replace").decode()
    )
    for path in (out / "check.json", *drawn):
        print(path, file=sys.stderr if as_json else sys.stdout)
    if over:
        sys.exit(1)


def _data_settings(source: str, overrides: Sequence[str]) -> "tuple[DataConfig, Config | None]":
    """The `data` section of FORMAT:ROOT or of a config file, and the config if it is one."""
    from leanclip.config.schema import load_config
    from leanclip.data import parse_source

    if Path(source).suffix in (".yaml", ".yml"):
        config = load_config(source, [f"data.{override}" for override in overrides])
        return config.data, config
    return parse_source(source, overrides), None
