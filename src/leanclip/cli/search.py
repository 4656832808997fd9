"""The commands under `leanclip search`: build an index of pictures, update it, find pictures."""

import json
import logging
import sys
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from leanclip.cli.options import (
    Arch,
    AsJson,
    BatchSize,
    Decoders,
    Device,
    MaxBadFraction,
    Model,
    Rows,
    find_model,
    is_json,
    sanitize,
)

if TYPE_CHECKING:
    from rich.text import Text

    from leanclip.search import Hit, Index

log = logging.getLogger("leanclip")
app = typer.Typer(
    help="Search your pictures by words or by pictures.",
    no_args_is_help=True,
    rich_markup_mode=None,
)

IndexFolder = Annotated[Path, typer.Argument(metavar="INDEX", help="The folder of an index.")]
IndexModel = Annotated[
    str | None,
    typer.Option(help="The index's model, where it is not where it was when it was built."),
]


@app.command(epilog="Example: leanclip search build photos --model runs/quickstart --out index")
def build(
    sources: Annotated[
        list[str],
        typer.Argument(help="Folders of images, .tar shards, or what leanclip embed wrote."),
    ],
    out: Annotated[Path, typer.Option(help="The folder to write, new or of an earlier start.")],
    model: Model = None,
    arch: Arch = None,
    root: Annotated[
        Path | None, typer.Option(help="The folder that leanclip embed was given; default: here.")
    ] = None,
    batch_size: BatchSize = 64,
    workers: Decoders = None,
    max_bad_fraction: MaxBadFraction = 0.1,
    device: Device = "auto",
    as_json: AsJson = False,
) -> None:
    """Make an index of pictures; the same command goes on where an earlier one was killed."""
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
    """Add what is new in an index's folders, drop what is gone, embed again what has changed."""
    opened = _open(index, model, arch, device)
    opened.update(batch_size=batch_size, workers=workers, max_bad_fraction=max_bad_fraction)
    _print_changes(opened, as_json)


@app.command(
    epilog='Example: leanclip search find index "a beach" --not people --date 2023.. --grid out.png'
)
def find(
    index: IndexFolder,
    texts: Annotated[
        list[str] | None, typer.Argument(help="Words; several are searched for together.")
    ] = None,
    images: Annotated[
        list[str] | None, typer.Option("--image", help="A picture or its URL; may be repeated.")
    ] = None,
    without: Annotated[
        list[str] | None, typer.Option("--not", help="Words that shall not fit; may be repeated.")
    ] = None,
    weights: Annotated[
        list[float] | None,
        typer.Option("--weight", help="One for each text, then for each picture."),
    ] = None,
    top: Annotated[int, typer.Option("--top", "-k", min=1, help="The most to find.")] = 10,
    minimum: Annotated[float | None, typer.Option(help="The least score to show.")] = None,
    label: Annotated[
        list[str] | None, typer.Option(help="A label that counts; may be repeated.")
    ] = None,
    folder: Annotated[
        Path | None, typer.Option(help="A folder that counts, with all below it.")
    ] = None,
    size: Annotated[str | None, typer.Option(help="Of files: 100k..2M, ..2M, 100k.. .")] = None,
    date: Annotated[
        str | None, typer.Option(help="Of files: 2024, 2024-05..2024-06-15, 2023.. .")
    ] = None,
    grid: Annotated[Path | None, typer.Option(help="Draw what is found: a .png or .svg.")] = None,
    model: IndexModel = None,
    arch: Arch = None,
    device: Device = "auto",
    as_json: AsJson = False,
) -> None:
    """Find pictures by words, by pictures, or by both."""
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
    _print(hits, as_json)
    if grid:
        _draw(opened, hits, grid)


def _draw(index: "Index", hits: "list[Hit]", path: Path) -> None:
    """Draw the pictures that can still be read."""
    from leanclip.errors import SampleError
    from leanclip.report.plots import image_grid

    pictures, titles = [], []
    for hit in hits:
        try:
            pictures.append(index.read(hit.number))
            titles.append(f"{hit.score:.3f} {Path(hit.path).name}")
        except SampleError as error:
            log.warning("not drawn: %s", error)
    if pictures:
        image_grid(pictures, titles, path)
        log.info("%s", path)


def _open(path: Path, model: str | None, arch: str | None, device: str) -> "Index":
    from leanclip.errors import ConfigError
    from leanclip.inference.load import load
    from leanclip.search import Index

    opened = Index.open(path)
    source = model or opened.model["source"]
    if source is None:
        raise ConfigError(f"{path}: does not say where its model is; give it with --model")
    opened.use(load(source, arch=arch, device=device))
    return opened


def _print_changes(index: "Index", as_json: bool) -> None:
    changes = index.changes
    if is_json(as_json):
        print(json.dumps({"index": str(index.path), **asdict(changes)}))
        return
    print(
        f"{changes.files:,} files in {index.path}, {changes.pictures:,} different pictures: "
        f"{changes.added:,} added, {changes.changed:,} changed, {changes.dropped:,} dropped, "
        f"{changes.skipped:,} unreadable"
    )


def _print(hits: "list[Hit]", as_json: bool) -> None:
    """A table, or JSON lines; the former without columns that say nothing."""
    has_labels, has_captions = any(hit.label for hit in hits), any(hit.caption for hit in hits)
    headings = ["score", "path", *["label"] * has_labels, *["caption"] * has_captions]
    rows = Rows(*headings, numbers=[0], as_json=as_json)
    if not hits and not rows.is_json:
        print("nothing found", file=sys.stderr)
        return
    for hit in hits:
        if rows.is_json:
            rows.add_json(_facts(hit))
            continue
        cells = [f"{hit.score:.3f}", _link(hit)]
        cells += [hit.label or ""] * has_labels
        cells += [(hit.caption or "").split("\n")[0]] * has_captions
        rows.add(*cells)
    rows.end()


def _facts(hit: "Hit") -> dict[str, Any]:
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

    path = sanitize(hit.path.removeprefix(f"{Path.cwd()}/"))
    link = Text(path, style=Style(link=Path(hit.shard or hit.path).as_uri()))
    more = f" (and {len(hit.paths) - 1} more)" if len(hit.paths) > 1 else ""
    return link.append(more, style=Style(link=None))
