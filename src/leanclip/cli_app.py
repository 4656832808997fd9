"""`leanclip app`: the page in a browser."""

from pathlib import Path
from typing import Annotated

import typer

from leanclip.cli_use import Device, Model, find_model

app = typer.Typer(rich_markup_mode=None)


@app.command("app", epilog="Example: leanclip app --model runs/quickstart --runs runs --port 8000")
def serve_page(
    model: Model = None,
    labels: Annotated[
        list[Path] | None,
        typer.Option("--labels", help="A file with a label a line, to choose on the page."),
    ] = None,
    calibration: Annotated[
        Path | None,
        typer.Option(help="A calibration.json of the model: probabilities, and none of these."),
    ] = None,
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: a free one.")] = 8000,
    host: Annotated[
        str, typer.Option(help="The address to bind; another than this machine's needs a token.")
    ] = "127.0.0.1",
    token: Annotated[
        str | None,
        typer.Option(envvar="LEANCLIP_TOKEN", help="What a browser or a program has to show."),
    ] = None,
    device: Device = "auto",
) -> None:
    """Play with a model in a browser: compare, classify, search, watch runs.

    The page and its API are on this machine alone, unless --host says otherwise.
    """
    from leanclip.errors import ConfigError

    try:
        from leanclip.app.server import serve
    except ModuleNotFoundError as error:
        raise ConfigError(f"{error.name}: is not installed; pip install 'leanclip[app]'") from None

    serve(
        find_model(model),
        host=host,
        port=port,
        token=token,
        device=device,
        labels=tuple(labels or ()),
        calibration=calibration,
        started=lambda address: print(f"{address}   (Ctrl-C ends it)", flush=True),
    )
