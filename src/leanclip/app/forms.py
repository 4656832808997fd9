"""What a form of the page, or of a program, holds: images and texts, within limits.

Images come as bytes in the form and in no other way: there is no path and no URL to be given.
"""

import asyncio
import os
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, BinaryIO, TypeVar

import torch
from anyio import CapacityLimiter
from anyio.to_thread import run_sync
from PIL import Image
from starlette.datastructures import FormData, UploadFile
from starlette.exceptions import HTTPException
from starlette.requests import Request

from leanclip.app.safety import Refused
from leanclip.errors import SampleError
from leanclip.io.files import split_lines
from leanclip.preprocess.decoding import open_image
from leanclip.preprocess.images import Preprocess, evaluation_pixels

T = TypeVar("T")

MAX_PIXELS = 50_000_000  # of an image: 150 MB when it is decoded
MAX_IMAGES, MAX_TEXTS, MAX_PROMPTS = 64, 2000, 2000
MAX_TEXT = 10_000  # characters
DECODERS = min(4, os.cpu_count() or 1)  # images that are decoded at once


@dataclass
class Upload:
    """An image of a form; its bytes, up to a megabyte, or a temporary file of them."""

    name: str
    file: BinaryIO

    def read(self) -> bytes:
        """The bytes; only by those who decode, so that not all that waits is in memory."""
        self.file.seek(0)
        return self.file.read()


@asynccontextmanager
async def form_of(request: Request) -> AsyncIterator["Form"]:
    """The form of a request.

    Raises:
        Refused: it is none, or a broken one.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind not in ("multipart/form-data", "application/x-www-form-urlencoded"):
        raise Refused(415, f"found {kind or 'no content type'}; send a form: multipart/form-data")
    try:
        found = await request.form(max_files=MAX_IMAGES, max_fields=MAX_TEXTS)
    except HTTPException as error:
        raise Refused(400, f"the form cannot be read: {error.detail}") from None
    except (KeyError, ValueError, UnicodeError) as error:
        raise Refused(400, f"the form cannot be read: {error}") from None
    try:
        yield Form(found)
    finally:
        await found.close()


class Form:
    """A form's fields, by name."""

    def __init__(self, data: FormData) -> None:
        self._data = data

    def texts(self, name: str) -> list[str]:
        """The texts of that name, one a line where one holds several; empty lines are left out.

        Raises:
            Refused: one is a file, or too long.
        """
        found: list[str] = []
        for value in self._data.getlist(name):
            if not isinstance(value, str):
                raise Refused(400, f"{name}: found a file; give text")
            found += [line.strip() for line in split_lines(value) if line.strip()]
        if any(len(text) > MAX_TEXT for text in found):
            raise Refused(400, f"{name}: one is over {MAX_TEXT:,} characters")
        if len(found) > MAX_TEXTS:
            raise Refused(400, f"{name}: found {len(found):,}; {MAX_TEXTS:,} are the most")
        return found

    def number(self, name: str, default: int, *, least: int, most: int) -> int:
        """A whole number."""
        return number(name, self._data.get(name), default, least=least, most=most)

    def field(self, name: str) -> str | None:
        """A field, as it is.

        Raises:
            Refused: it is a file.
        """
        value = self._data.get(name)
        if value is not None and not isinstance(value, str):
            raise Refused(400, f"{name}: found a file; give text")
        return value

    def images(self, name: str) -> list[Upload]:
        """The files of that name.

        Raises:
            Refused: there is none, or one is text.
        """
        found: list[Upload] = []
        for value in self._data.getlist(name):
            if not isinstance(value, UploadFile):
                raise Refused(400, f"{name}: found text; give an image as a file of the form")
            label = (value.filename or "").replace("\\", "/").rpartition("/")[2][:80]
            found.append(Upload(label or f"image {len(found) + 1}", value.file))
        if not found:
            raise Refused(400, f"{name}: there is no image in the form; give one or more")
        return found

    def image(self, name: str) -> Upload:
        """The one file of that name."""
        found = self.images(name)
        if len(found) > 1:
            raise Refused(400, f"{name}: found {len(found)} images; give one")
        return found[0]


def number(name: str, given: Any, default: int, *, least: int, most: int) -> int:
    """A whole number of a form or a query.

    Raises:
        Refused: it is none, or out of range.
    """
    if given in (None, ""):
        return default
    text = str(given)
    if not (text.isascii() and text.isdecimal() and len(text) < 10 and least <= int(text) <= most):
        raise Refused(400, f"{name}: found {text[:20]!r}; give a number from {least} to {most}")
    return int(text)


class Decoders:
    """Threads that decode uploads, a few at once, so that many do not fill the memory."""

    def __init__(self) -> None:
        self._limit: CapacityLimiter | None = None

    async def run(self, upload: Upload, work: Callable[[bytes], T]) -> T:
        """What `work` makes of an upload's bytes.

        Raises:
            Refused: it cannot be read as an image.
        """
        if self._limit is None:  # it belongs to the loop that runs now
            self._limit = CapacityLimiter(DECODERS)
        try:
            return await run_sync(lambda: work(upload.read()), limiter=self._limit)
        except SampleError as error:
            words = str(error).removeprefix("<bytes>: ")
            raise Refused(422, f"{upload.name}: {words}") from None


def pixels_of(content: bytes, preprocess: Preprocess) -> torch.Tensor:
    """What the model sees of an image, (3, R, R) uint8.

    Raises:
        SampleError: it cannot be read as an image, or has too many pixels.
    """
    return torch.from_numpy(evaluation_pixels(content, preprocess, max_pixels=MAX_PIXELS))


def picture_of(content: bytes) -> Image.Image:
    """An upright RGB image.

    Raises:
        SampleError: it cannot be read as an image, or has too many pixels.
    """
    return open_image(content, max_pixels=MAX_PIXELS)


async def every(*waiting: Any) -> list[Any]:
    """The results of several that run at once; the first error ends the others."""
    tasks = [asyncio.ensure_future(one) for one in waiting]
    try:
        return list(await asyncio.gather(*tasks))
    except BaseException:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)  # what they use is closed after this
        raise
