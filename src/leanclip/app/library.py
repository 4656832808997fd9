"""The API's other half: an index of pictures.

/api/search                     words, a picture, or one of the index -> hits
/api/pictures/{number}          a picture of the index, made anew and small
"""

import io
from typing import Any

import numpy as np
import torch
from anyio.to_thread import run_sync
from PIL import Image
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from leanclip.app.forms import Upload, every, form_of, number, picture_of
from leanclip.app.safety import Refused
from leanclip.app.service import service_of
from leanclip.errors import DataError
from leanclip.preprocess.images import as_jpeg
from leanclip.search import Hit, Index

MOST_HITS = 2000  # of a search, over all its pages
PAGE_OF_HITS = 200
SIDES = (64, 1024)  # pixels of a picture's long side


async def search_words(request: Request) -> Response:
    """By words, or like a picture of the index."""
    service = service_of(request)
    index, query = service.index, request.query_params
    offset, limit = _page(query.get("offset"), query.get("limit"))
    texts, without = [query.get("q", "").strip()], query.get("without", "").strip()
    if like := query.get("like"):
        vector = await run_sync(_vector, index, _picture_number(like))
    elif texts[0]:
        vector, *less = await every(*map(service.text, [*texts, *filter(None, [without])]))
        vector = vector.numpy() - (less[0].numpy() if less else 0)
    else:
        raise Refused(400, "q: say what to look for, in words")
    return await _answer(index, vector, offset, limit, query.get("label"))


async def search_picture(request: Request) -> Response:
    """By a picture of one's own."""
    service = service_of(request)
    index = service.index
    async with form_of(request) as form:
        upload = form.image("image")
        offset, limit = _page(form.field("offset"), form.field("limit"))
        label = form.field("label")
        features: torch.Tensor = await service.image(upload)
    return await _answer(index, features.numpy(), offset, limit, label)


async def picture(request: Request) -> Response:
    """A picture by its number, decoded and encoded again: nothing but its pixels gets out."""
    service = service_of(request)
    index, at = service.index, _picture_number(request.path_params["number"])
    side = number("side", request.query_params.get("side"), 320, least=SIDES[0], most=SIDES[1])
    try:
        content = await run_sync(index.read, at)
    except (DataError, OSError):
        raise _no_picture(at) from None
    upload = Upload(f"picture {at}", io.BytesIO(content))
    jpeg = await service.decoders.run(upload, lambda found: _small(picture_of(found), side))
    headers = {"cache-control": "private, max-age=3600"}  # a number is never used again
    return Response(jpeg, media_type="image/jpeg", headers=headers)


def _page(offset: object, limit: object) -> tuple[int, int]:
    most = MOST_HITS - 1
    return (
        number("offset", offset, 0, least=0, most=most),
        number("limit", limit, 30, least=1, most=PAGE_OF_HITS),
    )


def _picture_number(given: str) -> int:
    return number("picture", given, 0, least=0, most=10**9 - 1)


def _vector(index: Index, at: int) -> np.ndarray:
    try:
        return index.vector(at)
    except DataError:
        raise _no_picture(at) from None


def _no_picture(at: int) -> Refused:
    return Refused(404, f"picture {at}: the index has none of this number, or its file is gone")


async def _answer(
    index: Index, vector: np.ndarray, offset: int, limit: int, label: str | None
) -> Response:
    """The hits from `offset` on; one more is looked for, to say whether there are more."""
    end = min(offset + limit, MOST_HITS)

    def find() -> list[Hit]:
        return index.search_many(vector[None], k=end + 1, label=label or None)[0]

    found = await run_sync(find)
    return JSONResponse(
        {
            "hits": [_facts(hit) for hit in found[offset:end]],
            "is_end": len(found) <= end or end == MOST_HITS,
        }
    )


def _facts(hit: Hit) -> dict[str, Any]:
    return {
        "number": hit.number,
        "score": round(hit.score, 6),
        "path": plain(hit.path),
        "caption": None if hit.caption is None else plain(hit.caption),
        "label": None if hit.label is None else plain(hit.label),
    }


def _small(image: Image.Image, side: int) -> bytes:
    image.thumbnail((side, side), Image.Resampling.BICUBIC)
    return as_jpeg(image)


def plain(name: str) -> str:
    """A name as JSON can have it, whatever bytes the file system has."""
    return name.encode("utf-8", "replace").decode()
