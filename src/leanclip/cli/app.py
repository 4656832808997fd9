"""`leanclip app`: the local page."""

from pathlib import Path
from typing import Annotated

import typer

from leanclip.cli.options import Arch, Device, Model, find_model

app = typer.Typer(rich_markup_mode=None)


@app.command("app", epilog="Example: leanclip app --model runs/quickstart --port 8000")
def serve_page(
    model: Model = None,
    arch: Arch = None,
    index: Annotated[
        Path | None, typer.Option(help="An index to search, from: leanclip search build.")
    ] = None,
    labels: Annotated[
        list[Path] | None,
        typer.Option(
            "--labels", help="A label set: a file with one label per line; may be repeated."
        ),
    ] = None,
    calibration: Annotated[
        Path | None,
        typer.Option(help="From leanclip eval --calibrate: calibrated probabilities."),
    ] = None,
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 picks a free one.")] = 8000,
    host: Annotated[
        str, typer.Option(help="The address to bind; one that others can reach needs a token.")
    ] = "127.0.0.1",
    token: Annotated[
        str | None,
        typer.Option(envvar="LEANCLIP_TOKEN", help="Required of every request."),
    ] = None,
    device: Device = "auto",
) -> None:
    """Use a model in a browser: compare, classify, search.

    Only this machine can reach the page and its API, unless --host says otherwise.
    """
    from leanclip.io.optional_imports import need

    for library in ("fastapi", "uvicorn", "python_multipart"):
        need(library, "the page", extra="app")
    from leanclip.app.server import serve

    if index is None or model is not None:
        model = find_model(model)
    serve(
        model,
        arch=arch,
        host=host,
        port=port,
        token=token,
        device=device,
        index=index,
        labels=tuple(labels or ()),
        calibration=calibration,
        started=lambda address: print(f"{address}   (Ctrl-C ends it)", flush=True),
    )
