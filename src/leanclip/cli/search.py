"""The commands under `leanclip search`: build, update and search an index of images."""

import sys
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from typer import Argument, Option, Typer

from leanclip.cli.options import (
    Arch,
    AsJson,
    BatchSize,
    Decoders,
    Device,
    MaxBadFraction,
    Model,
    find_model,
)
from leanclip.cli.output import print_json, print_table, wants_json
from leanclip.errors import escaped

if TYPE_CHECKING:
    from rich.text import Text

    from leanclip.search import Hit, Index

app = Typer(help="Search images by text or by image.", no_args_is_help=True, rich_markup_mode=None)

IndexFolder = Annotated[Path, Argument(metavar="INDEX", help="The folder of an index.")]
IndexModel = Annotated[str | None, Option(help="The index's model, if it has moved since.")]

Weights = Annotated[
    list[float] | None, Option("--weight", help="One per text, then one per --image.")
]
SizeRange = Annotated[str | None, Option(help="File size: 100k..2M, ..2M or 100k.. .")]
DateRange = Annotated[
    str | None, Option(help="Date of the file: 2024, 2024-05..2024-06-15 or 2023.. .")
]
Without = Annotated[
    list[str] | None, Option("--not", help="Penalise images that match this text (repeatable).")
]


@app.command(epilog="Example: leanclip search build photos --model runs/quickstart --out index")
def build(
    sources: Annotated[
        list[str], Argument(help="Image folders, .tar shards, or folders from leanclip embed.")
    ],
    out: Annotated[Path, Option(help="The folder to write, new or from an interrupted build.")],
    model: Model = None,
    arch: Arch = None,
    root: Annotated[
        Path | None, Option(help="The folder given to leanclip embed. Default: here.")
    ] = None,
    batch_size: BatchSize = 64,
    workers: Decoders = None,
    max_bad_fraction: MaxBadFraction = 0.1,
    device: Device = "auto",
    as_json: AsJson = False,
) -> None:
    """Build an index of images. Repeat the command to continue after an interruption."""
    from leanclip.inference.load import load
    from leanclip.search import Index

    source = find_model(model)
    index = Index.build(
        sources,
        load(source, arch=arch, device=device),
        out,
        root=root,
        source=source,
        batch_size=batch_size,
        workers=workers,
        max_bad_fraction=max_bad_fraction,
    )
    _print_changes(index, as_json)


@app.command(epilog="Example: leanclip search update index")
def update(
    index: IndexFolder,
    model: IndexModel = None,
    arch: Arch = None,
    batch_size: BatchSize = 64,
    workers: Decoders = None,
    max_bad_fraction: MaxBadFraction = 0.1,
    device: Device = "auto",
    as_json: AsJson = False,
) -> None:
    """Add new images, remove deleted ones, and embed changed ones again."""
    opened = _open(index, model, arch, device)
    opened.update(batch_size=batch_size, workers=workers, max_bad_fraction=max_bad_fraction)
    _print_changes(opened, as_json)


@app.command(
    epilog='Example: leanclip search find index "a beach" --not people --date 2023.. --grid out.png'
)
def find(
    index: IndexFolder,
    texts: Annotated[
        list[str] | None, Argument(help="Texts; several are combined into one query.")
    ] = None,
    images: Annotated[
        list[str] | None, Option("--image", help="An image file or URL (repeatable).")
    ] = None,
    without: Without = None,
    weights: Weights = None,
    top: Annotated[int, Option("--top", "-k", min=1, help="Maximum number of results.")] = 10,
    minimum: Annotated[float | None, Option(help="Minimum score.")] = None,
    label: Annotated[list[str] | None, Option(help="Only this label (repeatable).")] = None,
    folder: Annotated[Path | None, Option(help="Only below this folder.")] = None,
    size: SizeRange = None,
    date: DateRange = None,
    grid: Annotated[Path | None, Option(help="Also draw the results: a .png or .svg.")] = None,
    model: IndexModel = None,
    arch: Arch = None,
    device: Device = "auto",
    as_json: AsJson = False,
) -> None:
    """Find images by text, by image, or by both."""
    from leanclip.api import draw_hits
    from leanclip.search.filters import date_range, size_range

    opened = _open(index, model, arch, device)
    query = opened.query(texts or (), images or (), without or (), weights)
    hits = opened.search(
        query,
        k=top,
        minimum=minimum,
        label=label or None,
        folder=folder,
        size=None if size is None else size_range(size),
        date=None if date is None else date_range(date),
    )
    if wants_json(as_json):
        for hit in hits:
            print_json(_record(hit))
    else:
        _print_hits(hits)
    if grid:
        draw_hits(opened, hits, grid)


def _open(path: Path, model: str | None, arch: str | None, device: str) -> "Index":
    from leanclip.errors import ConfigError
    from leanclip.inference.load import load
    from leanclip.search import Index

    index = Index.open(path)
    source = model or index.model["source"]
    if source is None:
        raise ConfigError(f"{path}: does not name its model; give it with --model")
    index.use(load(source, arch=arch, device=device))
    return index


def _print_changes(index: "Index", as_json: bool) -> None:
    changes = index.changes
    if wants_json(as_json):
        print_json({"index": str(index.path), **asdict(changes)})
        return
    from leanclip.report.text import count

    print(
        f"{count(changes.files, 'file')} in {index.path}, "
        f"{count(changes.pictures, 'distinct image')}: "
        f"{changes.added:,} added, {changes.changed:,} changed, {changes.dropped:,} removed, "
        f"{changes.skipped:,} unreadable"
    )


def _print_hits(hits: "list[Hit]") -> None:
    """Print a table, without columns that are empty."""
    if not hits:
        print("no results", file=sys.stderr)
        return
    columns: dict[str, list[str | Text]] = {
        "score": [f"{hit.score:.3f}" for hit in hits],
        "path": [_link(hit) for hit in hits],
        "label": [hit.label or "" for hit in hits],
        "caption": [(hit.caption or "").split("\n")[0] for hit in hits],
    }
    columns = {name: cells for name, cells in columns.items() if any(cells)}
    print_table(list(columns), zip(*columns.values(), strict=True), numbers=[0])


def _record(hit: "Hit") -> dict[str, Any]:
    return {
        "score": round(hit.score, 6),
        "number": hit.number,
        "path": hit.path,
        "paths": list(hit.paths),
        "caption": hit.caption,
        "label": hit.label,
        "size": hit.size,
        "date": datetime.fromtimestamp(hit.mtime).astimezone().isoformat(timespec="seconds"),
    }


def _link(hit: "Hit") -> "Text":
    """A path to click on."""
    from rich.style import Style
    from rich.text import Text

    path = escaped(hit.path.removeprefix(f"{Path.cwd()}/"))
    link = Text(path, style=Style(link=Path(hit.shard or hit.path).as_uri()))
    more = f" (and {len(hit.paths) - 1} more)" if len(hit.paths) > 1 else ""
    return link.append(more, style=Style(link=None))
