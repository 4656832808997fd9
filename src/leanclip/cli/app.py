"""`leanclip app`: the local page and its JSON API."""

from pathlib import Path
from typing import Annotated

from typer import Option, Typer

from leanclip.cli.options import Arch, Device, Model, find_model

app = Typer(rich_markup_mode=None)


@app.command("app", epilog="Example: leanclip app --model runs/quickstart --port 8000")
def serve_page(
    model: Model = None,
    arch: Arch = None,
    index: Annotated[
        Path | None, Option(help="An index to search (from leanclip search build).")
    ] = None,
    labels: Annotated[
        list[Path] | None, Option(help="A label set: a file with one label per line (repeatable).")
    ] = None,
    calibration: Annotated[
        Path | None, Option(help="Calibration of the probabilities (from leanclip eval).")
    ] = None,
    port: Annotated[int, Option(min=0, max=65535, help="Port; 0 picks a free one.")] = 8000,
    host: Annotated[
        str, Option(help="Address to bind; --token is required unless it is local.")
    ] = "127.0.0.1",
    token: Annotated[
        str | None, Option(envvar="LEANCLIP_TOKEN", help="Token that every request must have.")
    ] = None,
    device: Device = "auto",
) -> None:
    """Compare, classify and search images in the browser, or through the page's JSON API."""
    from leanclip.io.optional_imports import import_optional

    for library in ("fastapi", "uvicorn", "python_multipart"):
        import_optional(library, "the page", extra="app")
    from leanclip.app.server import serve

    serve(
        find_model(model) if model or index is None else None,
        arch=arch,
        host=host,
        port=port,
        token=token,
        device=device,
        index=index,
        labels=tuple(labels or ()),
        calibration=calibration,
        started=lambda address: print(f"{address}   (press Ctrl-C to stop)", flush=True),
    )
