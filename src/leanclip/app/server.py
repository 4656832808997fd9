"""The server: the FastAPI application with its pages, and the process.

Requests are answered while the model loads. If it cannot be loaded, the server stops.
"""

import asyncio
import logging
import socket
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Annotated

import uvicorn
from fastapi import APIRouter, FastAPI, Form, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, RedirectResponse, Response
from fastapi.staticfiles import StaticFiles
from fastapi.templating import Jinja2Templates
from starlette.exceptions import HTTPException as StarletteHTTPException

from leanclip.app.routes import MAX_IMAGES, MAX_TEXTS, router
from leanclip.app.safety import (
    MAX_BODY,
    TOO_LARGE,
    check_token,
    cookie_name,
    error,
    guard,
    is_same,
)
from leanclip.app.schemas import LabelSet
from leanclip.app.service import Service
from leanclip.app.worker import Worker
from leanclip.errors import ConfigError, LeanclipError
from leanclip.evaluation import Calibration
from leanclip.inference.classifier import check_labels, read_labels
from leanclip.inference.load import load
from leanclip.inference.model import InferenceModel
from leanclip.search import Index

log = logging.getLogger("leanclip")
ROOM = Path(__file__).parent
HANDLED = (StarletteHTTPException, RequestValidationError, LeanclipError, Exception)

html = Jinja2Templates(ROOM / "templates")  # escapes by default
pages = APIRouter(include_in_schema=False)


def make_app(service: Service, *, host: str = "127.0.0.1", token: str | None = None) -> FastAPI:
    """The whole application, for a server that is bound to `host`."""
    app = FastAPI(
        title="leanclip",
        version=version("leanclip"),
        description="The API behind `leanclip app`. Errors are JSON: `error` is one sentence.",
        docs_url=None,  # they load scripts from elsewhere
        redoc_url=None,
        form_limits={"max_files": MAX_IMAGES, "max_fields": MAX_TEXTS},
        exception_handlers=dict.fromkeys(HANDLED, report_error),
    )
    app.state.service = service
    guard(app, host=host, token=token)
    app.include_router(router)
    app.include_router(pages)
    app.mount("/static", StaticFiles(directory=ROOM / "static"))
    return app


@pages.head("/")
@pages.get("/")
async def index_page(request: Request) -> HTMLResponse:
    """The page."""
    return html.TemplateResponse(request, "index.html", {"max_bytes": MAX_BODY})


@pages.get("/sign-in")
async def sign_in_page(request: Request) -> HTMLResponse:
    """The form for the token."""
    return html.TemplateResponse(request, "sign-in.html")


@pages.post("/sign-in")
async def sign_in(request: Request, token: Annotated[str, Form()] = "") -> Response:
    """A cookie for the right token."""
    state = request.app.state
    if state.token is None or not is_same(token.strip(), state.token):
        await asyncio.sleep(0.5)  # slows down guessing
        context = {"error": "That is not the token."}
        return html.TemplateResponse(request, "sign-in.html", context, status_code=401)
    response = RedirectResponse("./", 303)
    response.set_cookie(cookie_name(request), state.session, httponly=True, samesite="strict")
    return response


async def report_error(request: Request, problem: Exception) -> Response:
    """Any error as the API reports it."""
    match problem:
        case StarletteHTTPException(status_code=413):
            return error(413, TOO_LARGE)
        case StarletteHTTPException():
            response = error(problem.status_code, problem.detail)
            response.headers.update(problem.headers or {})
            return response
        case RequestValidationError():
            first = problem.errors()[0]
            message = first["msg"].removeprefix("Value error, ")
            if "UploadFile" in message:
                message = "found text; give an image as a file of the form"
            return error(400, f"{first['loc'][1]}: {message}")
        case LeanclipError():
            return error(400, " ".join(str(problem).split()))
    log.error("%s %s: %r", request.method, request.url.path, problem, exc_info=problem)
    return error(500, "something went wrong on the server; its log has the details")


def serve(
    model: str | None,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    token: str | None = None,
    device: str = "auto",
    arch: str | None = None,
    labels: tuple[Path, ...] = (),
    calibration: Path | None = None,
    index: Path | None = None,
    started: Callable[[str], object] = lambda address: None,
) -> None:
    """Serve the page until the process is told to stop.

    Args:
        model: weights, as `load` takes them; None: those that the index was built with.
        port: 0 for a free one.
        arch: the architecture, where the weights do not tell it.
        token: required of every request; mandatory if other machines can reach `host`.
        labels: files with one label per line, offered as label sets.
        calibration: offered as a label set, too.
        started: called with the page's address.
    """
    check_token(host, token)
    opened = Index.open(index) if index else None
    if model is None and opened is not None:
        model = opened.model["source"]
    if model is None:
        raise ConfigError(f"{index}: does not name its model; give it with --model")
    worker = Worker(lambda: load_model(service, device, arch))
    service = Service(worker, model, index=opened)
    if calibration:
        known = service.calibration = Calibration.load(calibration)
        classes, templates = list(known.classes), list(known.templates)
        service.label_sets.append(LabelSet(name="calibrated", labels=classes, templates=templates))
    for path in labels:
        names = check_labels(read_labels(path))
        service.label_sets.append(LabelSet(name=path.stem, labels=names))
    with bind(host, port) as listener:
        config = uvicorn.Config(
            make_app(service, host=host, token=token),
            log_config=None,
            timeout_graceful_shutdown=5,  # seconds
        )
        server = uvicorn.Server(config)
        worker.start(failed=lambda: setattr(server, "should_exit", True))
        address = listener.getsockname()
        name = f"[{address[0]}]" if ":" in address[0] else address[0]
        started(f"http://{name}:{address[1]}/")
        server.run(sockets=[listener])
        if worker.loaded.done() and (problem := worker.loaded.exception()):
            raise problem


def bind(host: str, port: int) -> socket.socket:
    """A listening socket.

    Raises:
        ConfigError: the address is not available.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=2048)
    except OSError as error:
        message = f"{error.strerror}; choose another with --port, or --port 0 for a free one"
        raise ConfigError(f"--host {host} --port {port}: {message}") from None


def load_model(service: Service, device: str, arch: str | None) -> InferenceModel:
    """The model, which must be that of the calibration and of the index."""
    clip = load(service.model_name, device=device, arch=arch)
    if known := service.calibration:
        known.check(clip.model, known.classes, known.templates)
    if service.index is not None:
        service.index.use(clip)
    log.info("model loaded: %s", service.model_name)
    return clip
