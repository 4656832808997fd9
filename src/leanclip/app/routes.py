"""The API's endpoints. FastAPI validates requests and describes them by the signatures."""

import asyncio
import io
from dataclasses import replace
from importlib.metadata import version
from typing import Annotated, Any

import numpy as np
import torch
from anyio.to_thread import run_sync
from fastapi import APIRouter, Depends, File, Form, HTTPException, Query, Request, UploadFile
from fastapi.responses import Response
from PIL import Image
from pydantic import AfterValidator, Field
from torch.nn import functional as F

from leanclip.app import schemas
from leanclip.app.heat import heat_picture
from leanclip.app.service import Service, file_name, to_image
from leanclip.app.worker import RETRY_AFTER, gradient_maps, rollouts
from leanclip.errors import DataError
from leanclip.evaluation.classification import Probabilities
from leanclip.inference.classifier import predictions
from leanclip.io.files import split_lines
from leanclip.preprocess.images import encode_jpeg
from leanclip.search import Index

MAX_IMAGES, MAX_TEXTS = 64, 2000
MAX_LABELS = 1000  # of an index, listed
MAX_HITS = 2000  # of a search, over all its pages
JPEG: Any = {"response_class": Response, "responses": {200: {"content": {"image/jpeg": {}}}}}
FORMATS = "JPEG, PNG, BMP, WebP, GIF or TIFF"


def texts_in(values: list[str]) -> list[str]:
    """The texts, one per line or per field, without empty ones."""
    texts = [line.strip() for value in values for line in split_lines(value) if line.strip()]
    if len(texts) > MAX_TEXTS:
        raise ValueError(f"found {len(texts):,}; give at most {MAX_TEXTS:,}")
    return texts


def get_service(request: Request) -> Service:
    """The service of the application."""
    return request.app.state.service


def get_index(service: Annotated[Service, Depends(get_service)]) -> Index:
    """The index, which can be searched once the model is loaded."""
    _ = service.worker.clip
    if service.index is None:
        raise HTTPException(409, "no index: start the page with one: leanclip app --index ...")
    return service.index


def get_image(
    image: Annotated[list[UploadFile], File(max_length=1, description=FORMATS)],
) -> UploadFile:
    """The only image of a form."""
    return image[0]


TheService = Annotated[Service, Depends(get_service)]
TheIndex = Annotated[Index, Depends(get_index)]
Lines = Annotated[list[str], AfterValidator(texts_in), Form()]
OptionalLines = Annotated[list[str], AfterValidator(texts_in), Form(default_factory=list)]
ImageFiles = Annotated[list[UploadFile], File(description=FORMATS)]
ImageFile = Annotated[UploadFile, Depends(get_image)]
Offset = Annotated[int, Field(ge=0, lt=MAX_HITS)]
Limit = Annotated[int, Field(ge=1, le=200)]
Number = Annotated[int, Field(ge=0, lt=10**9)]  # of a picture

router = APIRouter(responses={"default": {"model": schemas.Error, "description": "an error"}})


@router.head("/healthz", include_in_schema=False)
@router.get("/healthz", responses={503: {"model": schemas.Health}})
async def health(service: TheService, response: Response) -> schemas.Health:
    """Whether requests are answered, for a load balancer or a script that waits."""
    worker = service.worker
    if worker.state == "loading":
        response.status_code = 503
        response.headers.update(RETRY_AFTER)
    return schemas.Health(status=worker.state, jobs=worker.jobs, passes=worker.passes)


@router.get("/api/about")
async def about(service: TheService) -> schemas.About:
    """The model, the index and the label sets."""
    state, sets = service.worker.state, service.label_sets
    found = schemas.About(version=version("leanclip"), state=state, label_sets=sets)
    if state == "ready":
        clip = service.worker.clip
        found.model = schemas.ModelInfo(
            name=service.model_name,
            resolution=clip.preprocess.resolution,
            embed_dim=clip.model.config.embed_dim,
            context=clip.model.context_length,
        )
        found.templates = list(clip.templates)
    if (index := service.index) is not None:
        labels = sorted(index.labels())[:MAX_LABELS]
        found.index = schemas.IndexInfo(pictures=len(index), labels=labels)
    return found


@router.post("/api/compare")
async def compare(
    service: TheService,
    images: ImageFiles,
    texts: Lines,
) -> schemas.Comparison:
    """Cosine similarities of images and texts, one text per line or field."""
    if not texts:
        raise HTTPException(400, "texts: found none; give at least one")
    features = await asyncio.gather(*map(service.text, texts), *map(service.image, images))
    text_rows, image_rows = features[: len(texts)], features[len(texts) :]
    similarity = torch.stack(text_rows) @ torch.stack(image_rows).T
    names = [file_name(image) for image in images]
    return schemas.Comparison(texts=texts, images=names, similarity=similarity.tolist())


@router.post("/api/classify")
async def classify(
    service: TheService,
    image: ImageFile,
    labels: Lines,
    templates: OptionalLines,
    top: Annotated[int, Form(ge=1, le=MAX_TEXTS)] = 5,
    probabilities: Annotated[Probabilities | None, Form()] = None,
) -> schemas.Classification:
    """The most probable labels of an image. Templates have {} for the label.

    Probabilities are calibrated if the server has a calibration for these labels and templates.
    Otherwise they are those asked for; by default sigmoids if the model has a logit bias.
    """
    templates = templates or list(service.worker.clip.templates)
    classifier, features = await asyncio.gather(
        service.classifier(labels, templates, probabilities), service.image(image)
    )
    is_calibrated = classifier.calibration is not None
    found = predictions(classifier, features[None], top)[0]
    is_none = is_calibrated and not found
    if is_none:
        found = predictions(replace(classifier, calibration=None), features[None], top)[0]
    return schemas.Classification(
        image=file_name(image),
        calibrated=is_calibrated,
        probabilities="softmax" if is_calibrated else classifier.probabilities,
        none_of_these=is_none,
        predictions=[schemas.Prediction.model_validate(one, from_attributes=True) for one in found],
    )


@router.post("/api/attention", **JPEG)
async def attention(service: TheService, image: ImageFile, texts: OptionalLines) -> Response:
    """The image under a map of what the model attended to: for the texts' mean, or in general."""
    pixels = await service.decode(image, service.to_pixels)
    picture = await service.decode(image, to_image)
    if texts:
        features = await asyncio.gather(*map(service.text, texts))
        text = F.normalize(torch.stack(features).mean(dim=0), dim=-1)
        heat = await service.worker.run(gradient_maps, (pixels, text))
    else:
        heat = await service.worker.run(rollouts, pixels)
    preprocess = service.worker.clip.preprocess
    jpeg = await run_sync(heat_picture, picture, heat.numpy(), preprocess)
    return Response(jpeg, media_type="image/jpeg")


@router.get("/api/search")
async def search_words(
    service: TheService,
    index: TheIndex,
    q: Annotated[str, Query(description="words")] = "",
    without: Annotated[str, Query(description="words for what is not wanted")] = "",
    like: Annotated[Number | None, Query(description="or the number of a picture")] = None,
    label: Annotated[str, Query(description="only pictures with this label")] = "",
    offset: Offset = 0,
    limit: Limit = 30,
) -> schemas.Hits:
    """Pictures that match words, or are like another of the index."""
    if like is not None:
        try:
            vector = await run_sync(index.vector, like)
        except DataError:
            raise no_picture(like) from None
    elif q.strip():
        texts = [text for text in (q.strip(), without.strip()) if text]
        features = await asyncio.gather(*map(service.text, texts))
        vector = (features[0] - sum(features[1:])).numpy()
    else:
        raise HTTPException(400, "q: enter what to search for")
    return await find(index, vector, label, offset, limit)


@router.post("/api/search")
async def search_image(
    service: TheService,
    index: TheIndex,
    image: ImageFile,
    label: Annotated[str, Form()] = "",
    offset: Annotated[Offset, Form()] = 0,
    limit: Annotated[Limit, Form()] = 30,
) -> schemas.Hits:
    """Pictures like an image."""
    return await find(index, (await service.image(image)).numpy(), label, offset, limit)


@router.get("/api/pictures/{number}", **JPEG)
async def picture(
    service: TheService,
    index: TheIndex,
    number: Number,
    side: Annotated[int, Query(ge=64, le=1024, description="pixels of the longer side")] = 320,
) -> Response:
    """A picture by its number, decoded and encoded again, so that only pixels are served."""

    def shrink(content: bytes) -> bytes:
        image = to_image(content)
        image.thumbnail((side, side), Image.Resampling.BICUBIC)
        return encode_jpeg(image)

    try:
        content = await run_sync(index.read, number)
    except (DataError, OSError):
        raise no_picture(number) from None
    upload = UploadFile(io.BytesIO(content), filename=f"picture {number}")
    jpeg = await service.decode(upload, shrink)
    headers = {"cache-control": "private, max-age=3600"}  # a number is never used again
    return Response(jpeg, headers=headers, media_type="image/jpeg")


def no_picture(number: int) -> HTTPException:
    """The error for a number that is not in the index."""
    return HTTPException(404, f"picture {number}: not in the index, or its file is gone")


async def find(
    index: Index, vector: np.ndarray, label: str, offset: int, limit: int
) -> schemas.Hits:
    """One page of hits. One more is searched for, to know whether it is the last page."""
    end = min(offset + limit, MAX_HITS)

    def search() -> list[schemas.Hit]:
        found = index.search_many(vector[None], k=end + 1, label=label or None)[0]
        return [schemas.Hit.model_validate(hit, from_attributes=True) for hit in found]

    hits = await run_sync(search)
    return schemas.Hits(hits=hits[offset:end], is_end=len(hits) <= end or end == MAX_HITS)
