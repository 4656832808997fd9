"""The API behind the page: forms in, JSON out; what cannot be answered says so in words.

/api/about                     the model, its label sets, its limits
/api/compare   images, texts   cosines
/api/classify  image, labels   probabilities, or none of these
/api/attention image, texts    a picture of where the model looked
/healthz, /openapi.json, /sign-in, and the page itself
"""

import asyncio
import logging
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from anyio.to_thread import run_sync
from PIL import Image
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from leanclip.app import forms, library
from leanclip.app.forms import every, form_of
from leanclip.app.heat import heat_picture
from leanclip.app.openapi import description
from leanclip.app.safety import MAX_BODY, Refused, Safety, cookie_name, is_same
from leanclip.app.service import Service, service_of
from leanclip.app.worker import RETRY_AFTER, NotReady, mean_feature
from leanclip.data.prompts import TEMPLATES
from leanclip.errors import LeanclipError
from leanclip.inference.classifier import guesses

log = logging.getLogger("leanclip")
PAGE = Path(__file__).parent / "page"
MOST_LABELS = 1000  # of an index, offered to choose from
KINDS = {".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}


async def about(request: Request) -> Response:
    """What the page shows and offers."""
    service = service_of(request)
    facts: dict[str, Any] = {
        "version": version("leanclip"),
        "state": state(service),
        "model": None,
        "index": None,
        "label_sets": [{"name": k, "labels": v} for k, v in service.label_sets.items()],
        "templates": list(TEMPLATES),
        "limits": {
            "request_bytes": MAX_BODY,
            "pixels": forms.MAX_PIXELS,
            "images": forms.MAX_IMAGES,
            "texts": forms.MAX_TEXTS,
        },
    }
    if service.calibration:
        known = service.calibration
        calibrated = {"name": "calibrated", "labels": list(known.classes)}
        facts["label_sets"].insert(0, calibrated | {"templates": list(known.templates)})
    if service.opened is not None:
        facts["index"] = {
            "pictures": len(service.opened),
            "labels": sorted(service.opened.labels())[:MOST_LABELS],
        }
    if service.worker and service.worker.is_ready:
        clip = service.worker.clip
        facts["model"] = {
            "name": service.model_name,
            "resolution": clip.preprocess.resolution,
            "embed_dim": clip.model.config.embed_dim,
            "context": clip.model.context_length,
        }
    return JSONResponse(facts)


async def compare(request: Request) -> Response:
    """Cosines of images with texts."""
    service = service_of(request)
    _ = service.model  # before a large form is read
    async with form_of(request) as form:
        uploads, texts = form.images("images"), form.texts("texts")
        if not texts:
            raise Refused(400, "texts: there is none; give one or more")
        found = await every(*map(service.text, texts), *map(service.image, uploads))
    text_rows, image_rows = torch.stack(found[: len(texts)]), torch.stack(found[len(texts) :])
    cosines = text_rows @ image_rows.T  # (M, N)
    return JSONResponse(
        {
            "texts": texts,
            "images": [upload.name for upload in uploads],
            "similarity": _rounded(cosines.tolist()),
        }
    )


async def classify(request: Request) -> Response:
    """Which label fits an image."""
    service = service_of(request)
    _ = service.model
    async with form_of(request) as form:
        upload, labels = form.image("image"), form.texts("labels")
        templates = form.texts("templates") or list(TEMPLATES)
        top = form.number("top", 5, least=1, most=forms.MAX_TEXTS)
        classifier, features = await every(
            service.classifier(labels, templates), service.image(upload)
        )
    plain = replace(classifier, calibration=None)
    known = classifier.calibration
    is_none = known is not None and not guesses(classifier, features[None], 1)[0]
    if known is not None and not is_none:
        plain = classifier
    found = guesses(plain, features[None], top)[0]
    return JSONResponse(
        {
            "image": upload.name,
            "calibrated": known is not None,
            "none_of_these": is_none,
            "guesses": [
                {"label": label, "probability": round(p, 6), "similarity": round(s, 6)}
                for label, p, s in found
            ],
        }
    )


async def attention(request: Request) -> Response:
    """A picture of where the model looked: for texts, whose mean is taken, or without any."""
    service = service_of(request)
    worker = service.model
    async with form_of(request) as form:
        upload, texts = form.image("image"), form.texts("texts")
        resolution = worker.clip.preprocess.resolution

        def work(content: bytes) -> tuple[torch.Tensor, Image.Image]:
            return forms.pixels_of(content, resolution), forms.picture_of(content)

        (pixels, image), *features = await every(
            service.decoders.run(upload, work), *map(service.text, texts)
        )
    text = mean_feature(features) if features else None
    heat = await asyncio.wrap_future(worker.map(pixels, text))
    picture = await run_sync(heat_picture, image, heat.numpy())
    return Response(picture, media_type="image/jpeg")


async def health(request: Request) -> Response:
    """Whether requests are answered, for a load balancer or a script that waits."""
    service = service_of(request)
    now = state(service)
    facts: dict[str, Any] = {"status": now}
    if service.worker:
        facts |= {"jobs": service.worker.jobs, "passes": service.worker.passes}
    if now in ("ready", "no model"):
        return JSONResponse(facts)
    return JSONResponse(facts, 503, {"retry-after": str(RETRY_AFTER)})


def state(service: Service) -> str:
    """Of the model: ready, loading, failed or no model."""
    if service.worker is None:
        return "no model"
    if service.worker.error is not None:
        return "failed"
    return "ready" if service.worker.is_ready else "loading"


async def openapi(request: Request) -> Response:
    """The description of this API."""
    return JSONResponse(description())


async def sign_in(request: Request) -> Response:
    """The form that takes the token, and the cookie for the right one."""
    safety: Safety = request.scope["leanclip.safety"]
    if request.method == "GET":
        return Response((PAGE / "sign-in.html").read_bytes(), media_type="text/html")
    async with form_of(request) as form:
        given = "".join(form.texts("token"))
    if safety.token is None or not is_same(given, safety.token):
        await asyncio.sleep(0.5)  # guessing is slow
        page = (PAGE / "sign-in.html").read_text(encoding="utf-8")
        page = page.replace("<!-- wrong -->", "That is not the token.")
        return Response(page, 401, media_type="text/html")
    answer = Response(status_code=303, headers={"location": "/"})
    name = cookie_name(request.scope)
    answer.set_cookie(name, safety.session, httponly=True, samesite="strict")
    return answer


async def page(request: Request) -> Response:
    """The page."""
    return Response((PAGE / "index.html").read_bytes(), media_type="text/html")


async def part_of_page(request: Request) -> Response:
    """One of the files that the page is made of; a name is looked up, and leads nowhere else."""
    files = {path.name: path for path in PAGE.iterdir() if path.suffix in KINDS}
    path = files.get(request.path_params["name"])
    if path is None:
        raise HTTPException(404)
    return Response(path.read_bytes(), media_type=KINDS[path.suffix])


def make_app(service: Service, *, host: str = "127.0.0.1", token: str | None = None) -> Safety:
    """The whole application, to be served at an address."""
    app = Starlette(
        routes=ROUTES,
        exception_handlers={
            Refused: _refused,
            ClientDisconnect: _gone,
            NotReady: _not_ready,
            LeanclipError: _mistake,
            HTTPException: _http,
            Exception: _broken,
        },
    )
    app.state.service = service
    return Safety(app, host=host, token=token)


ROUTES = [
    Route("/", page),
    Route("/sign-in", sign_in, methods=["GET", "POST"]),
    Route("/healthz", health),
    Route("/openapi.json", openapi),
    Route("/api/about", about),
    Route("/api/compare", compare, methods=["POST"]),
    Route("/api/classify", classify, methods=["POST"]),
    Route("/api/attention", attention, methods=["POST"]),
    Route("/api/search", library.search_words),
    Route("/api/search", library.search_picture, methods=["POST"]),
    Route("/api/pictures/{number}", library.picture),
    Route("/{name}", part_of_page),
]


def _rounded(rows: list[list[float]]) -> list[list[float]]:
    return [[round(value, 6) for value in row] for row in rows]


def _refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, Refused)
    return error.answer()


def _not_ready(request: Request, error: Exception) -> Response:
    return JSONResponse({"error": str(error)}, 503, {"retry-after": str(RETRY_AFTER)})


def _mistake(request: Request, error: Exception) -> Response:
    return JSONResponse({"error": " ".join(str(error).split())}, 400)


def _gone(request: Request, error: Exception) -> Response:
    return Response(status_code=400)  # to nobody


def _http(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    words = {404: "there is nothing of that name here", 405: "that is not done with this method"}
    said = words.get(error.status_code, error.detail)
    return JSONResponse({"error": said}, error.status_code, error.headers)


def _broken(request: Request, error: Exception) -> Response:
    log.error("%s %s: %r", request.method, request.url.path, error)
    said = "something went wrong on the server, and its log says what; this is a fault of leanclip"
    return JSONResponse({"error": said}, 500)
