"""The address and the process: a socket, uvicorn on it, the model loading beside.

The server answers while the model loads. Where that fails it stops, and says why.
"""

import logging
import socket
from collections.abc import Callable
from pathlib import Path

import uvicorn

from leanclip.app.routes import make_app
from leanclip.app.safety import is_loopback
from leanclip.app.service import Service
from leanclip.app.worker import Worker
from leanclip.errors import ConfigError
from leanclip.evaluation import Calibration
from leanclip.inference.classifier import check_labels, read_labels
from leanclip.inference.model import Clip, load
from leanclip.search import Index

log = logging.getLogger("leanclip")
LEAST_TOKEN = 16  # characters


def serve(
    model: str | None,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    token: str | None = None,
    device: str = "auto",
    labels: tuple[Path, ...] = (),
    calibration: Path | None = None,
    index: Path | None = None,
    started: Callable[[str], object] = lambda address: None,
) -> None:
    """Serve the page until the process is told to stop.

    Args:
        model: weights, as `load` takes them; None: a page without a model.
        host: the address to bind; another than this machine's own needs a token.
        port: 0 takes a free one.
        token: what a request has to show.
        device: of the model.
        labels: files with a label a line, offered by their names.
        calibration: of the model; its classes are offered as a label set.
        index: of `leanclip search build`, made with the model.
        started: called with the page's address.

    Raises:
        ConfigError: the address cannot be had, or a token is missing or too short.
        LeanclipError: the model, labels or a calibration cannot be read.
    """
    check_token(host, token)
    if index is not None:
        opened = Index.open(index)
        model = model or opened.model.get("source")
        opened.close()
        if model is None:
            raise ConfigError(f"{index}: does not say where its model is; give it with --model")
    service = Service(
        worker=None,
        model_name=model or "",
        label_sets={path.stem: check_labels(read_labels(path)) for path in labels},
        calibration=Calibration.load(calibration) if calibration else None,
        has_index=index is not None,
    )
    with bound(host, port) as listener:
        address = listener.getsockname()
        server = uvicorn.Server(
            uvicorn.Config(
                make_app(service, host=host, token=token),
                http="h11",
                ws="none",
                loop="asyncio",
                lifespan="off",
                log_config=None,
                log_level="warning",
                access_log=False,
                server_header=False,
                proxy_headers=False,
                timeout_graceful_shutdown=5,
            )
        )

        def stop() -> None:
            server.should_exit = True

        if model is not None:
            worker = Worker(lambda: _loaded(model, device, index, service), failed=stop)
            service.worker = worker
            worker.start()
        name = f"[{address[0]}]" if ":" in address[0] else address[0]
        started(f"http://{name}:{address[1]}/")
        server.run(sockets=[listener])
        if service.worker is not None:
            if service.worker.error is not None:
                raise service.worker.error
            service.worker.stop()


def check_token(host: str, token: str | None) -> None:
    """See that what others can reach has a token.

    Raises:
        ConfigError: it is missing, or too short to be one.
    """
    if token is None and not is_loopback(host):
        raise ConfigError(
            f"--host {host}: others can reach that address, so it needs a token: set "
            f"LEANCLIP_TOKEN or --token to {LEAST_TOKEN} characters or more that nobody guesses, "
            f"for example by: openssl rand -hex 16"
        )
    if token is not None and (len(token) < LEAST_TOKEN or not token.isascii()):
        raise ConfigError(f"--token: give {LEAST_TOKEN} plain characters or more")


def bound(host: str, port: int) -> socket.socket:
    """A socket at an address.

    Raises:
        ConfigError: it cannot be had.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
        listener.listen(2048)  # from now on who connects waits, and is not turned away
    except (OSError, OverflowError) as error:
        listener.close()
        reason = error.strerror if isinstance(error, OSError) else error
        raise ConfigError(f"{host}:{port}: {reason}; another with --port, or --port 0") from None
    return listener


def _loaded(model: str, device: str, index: Path | None, service: Service) -> Clip:
    """The model, which has to be that of the calibration and of the index."""
    clip = load(model, device=device)
    if known := service.calibration:
        known.check(clip.model, known.classes, known.templates)
    if index is not None:
        service.opened = Index.open(index, clip)
    log.info("the model is loaded: %s", model)
    return clip
