"""Read all of a data set before training, for what is unusable, unusual, duplicate or leaked.

    parts (splits) -> chunks -> processes: decode, hash, count tokens -> arrays -> findings

An image becomes a row of RECORD, a caption a row of CAPTION: 288 and 24 bytes.

Shapes: N images, C captions.
"""

import hashlib
import os
from collections.abc import Callable, Container, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from itertools import chain, count
from pathlib import Path

import numpy as np
from PIL import Image

from leanclip.config.data import DataConfig
from leanclip.data import open_dataset
from leanclip.data.dataset import Dataset, Sample
from leanclip.data.scaled_decode import image_bytes, is_rotated, open_header, open_scaled
from leanclip.data.skipped import Bad
from leanclip.data.splits import find_splits
from leanclip.data.tools.duplicates import FINGERPRINT, fingerprint
from leanclip.data.tools.parallel import Note, in_processes
from leanclip.errors import ConfigError, SampleError
from leanclip.preprocess.image_formats import SUFFIXES, SUFFIXES_OF
from leanclip.preprocess.text import Tokenizer

TINY = 32  # a short side below this, in pixels
HUGE = 50_000_000  # more pixels than this
VERY_LONG = 2000  # more characters than this; tokens are counted in the first ones

# Unusual properties of usable images, by the bits of RECORD's `odd`.
ODD = ("tiny", "huge", "CMYK", "16-bit", "palette", "transparent", "greyscale", "turned",
       "animated", "misnamed")  # fmt: skip
RECORD = np.dtype(
    [
        ("sha", np.uint64, 4),  # SHA-256 of the file
        *FINGERPRINT,
        ("index", np.int64),
        ("label", np.int32),
        ("width", np.int32),
        ("height", np.int32),
        ("odd", np.uint16),
        ("part", np.uint16),
    ]
)
CAPTION = np.dtype(
    [("text", np.uint64), ("index", np.int64), ("tokens", np.int32), ("length", np.int32)]
)

DRAWN = 24  # images in samples.png, of all parts
_CHUNK = 64  # samples of a task
_SUFFIXES = SUFFIXES_OF | {"MPO": SUFFIXES_OF["JPEG"]}


@dataclass
class Part:
    """An opened split, and the results of reading it."""

    name: str
    config: DataConfig
    dataset: Dataset
    images: np.ndarray  # (N,) RECORD, of those that can be read
    captions: np.ndarray  # (C,) CAPTION, in class data none
    bad: list[Bad]


def open_parts(configs: Sequence[DataConfig], splits: Sequence[str] = ()) -> list[Part]:
    """Open the splits of sources; without `splits` all that `find_splits` finds.

    Raises:
        DataError: one is missing or empty.
        ConfigError: a source is read as a stream.
    """
    wanted: dict[str, DataConfig] = {}
    for config in configs:
        if config.streaming or any(source.streaming for source in config.sources):
            raise ConfigError(f"{config.root}: streaming data is not checked; set streaming: false")
        # What training refuses to open is reported here.
        config = config.model_copy(update={"epoch_size": None, "max_bad_fraction": 1.0})
        is_one = config.split is not None or config.format == "mixture"
        own = (config.split,) if is_one else find_splits(config) or (None,)
        for split in splits or own:
            part = config.model_copy(update={"split": split})
            if not any(_is_same(other, part) for other in wanted.values()):
                wanted[_free_name(split or "all", config, wanted)] = part
    return [
        Part(name, config, open_dataset(config), np.empty(0, RECORD), np.empty(0, CAPTION), [])
        for name, config in wanted.items()
    ]


def read_parts(
    parts: Sequence[Part],
    *,
    tokenizer: Tokenizer = Tokenizer(),  # noqa: B008, a constant
    workers: int | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> None:
    """Read every sample of the parts, into them.

    Args:
        parts: from `open_parts`.
        tokenizer: that counts the tokens of captions.
        workers: processes; 0: this one; None: one per CPU core.
        progress: called with the numbers of samples done and in all.

    Raises:
        DataError: a process died.
    """
    if workers is None:
        workers = len(os.sched_getaffinity(0))
    total, before = sum(len(part.dataset) for part in parts), 0
    for number, part in enumerate(parts):
        size = len(part.dataset)
        results = in_processes(
            partial(
                _read,
                dataset=part.dataset,
                tokenizer=tokenizer,
                max_pixels=part.config.max_pixels,
            ),
            (range(first, min(first + _CHUNK, size)) for first in range(0, size, _CHUNK)),
            workers,
            name=part.dataset.name,
            progress=lambda done, before=before: progress(before + done, total),
        )
        with closing(results):
            images, captions, bad = zip(*results, strict=True)
        part.images, part.captions = np.concatenate(images), np.concatenate(captions)
        part.images["part"] = number
        part.bad = [one for some in bad for one in some]
        before += size


def examples(parts: Sequence[Part]) -> list[tuple[Path | bytes, str]]:
    """A random sample of readable images from each part, each with a caption."""
    rng = np.random.default_rng(0)
    count = -(-DRAWN // max(1, len(parts)))
    chosen = []
    for part in parts:
        rows = rng.permutation(len(part.images))[:count]
        for index in part.images["index"][np.sort(rows)].tolist():
            sample = part.dataset[index]
            chosen.append((sample.image, f"{part.name}: {_first_caption(part.dataset, sample)}"))
    return chosen[:DRAWN]


def _first_caption(dataset: Dataset, sample: Sample) -> str:
    if dataset.classes and sample.label is not None:
        return dataset.classes[sample.label]
    caption = next(iter(sample.captions), "")
    return caption if len(caption) <= 80 else f"{caption[:79]}…"


def _free_name(name: str, config: DataConfig, taken: Container[str]) -> str:
    """`name`; where it is taken, with the root's name before it and a number after it."""
    longer = f"{Path(config.root).name}/{name}"
    numbered = (f"{longer} ({number})" for number in count(2))
    return next(one for one in chain([name, longer], numbered) if one not in taken)


def _is_same(a: DataConfig, b: DataConfig) -> bool:
    return (a.format, a.root, a.split, a.sources) == (b.format, b.root, b.split, b.sources)


def _read(
    indices: range, note: Note, *, dataset: Dataset, tokenizer: Tokenizer, max_pixels: int
) -> tuple[np.ndarray, np.ndarray, list[Bad]]:
    """Images, captions and bad samples of a range; runs in the workers."""
    images, captions, bad = np.zeros(len(indices), RECORD), [], []
    done = 0
    for index in indices:
        note(index)
        sample = None
        try:
            sample = dataset[index]
            if not dataset.classes:
                captions += list(_caption_rows(sample, index, tokenizer))
            _describe(sample, max_pixels, images[done])
        except SampleError as error:
            bad.append(Bad.of(sample.id if sample else dataset.name(index), error))
            continue
        images[done]["index"] = index
        images[done]["label"] = -1 if sample.label is None else sample.label
        done += 1
    return images[:done], np.array(captions, CAPTION), bad


def _caption_rows(
    sample: Sample, index: int, tokenizer: Tokenizer
) -> Iterator[tuple[int, int, int, int]]:
    """Rows of CAPTION: a hash with white space collapsed, and tokens with start and end."""
    if not any(caption.strip() for caption in sample.captions):
        raise SampleError("empty caption", f"{sample.id}: an empty caption")
    for caption in sample.captions:
        text = " ".join(caption.split())
        digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()
        tokens = len(tokenizer.encode(text[:VERY_LONG]))
        yield int.from_bytes(digest), index, tokens, len(text)


def _describe(sample: Sample, max_pixels: int, row: np.void) -> None:
    """Fill in the row of RECORD of an image.

    Raises:
        SampleError: it cannot be read.
    """
    data = image_bytes(sample)
    header = open_header(data, max_pixels=max_pixels)
    row["width"], row["height"] = header.size
    name = sample.image if isinstance(sample.image, Path) else Path(sample.id)
    image = open_scaled(header, 2 * 17, max_pixels=max_pixels)
    row["signs"], row["colors"] = fingerprint(image)
    header = open_header(data, max_pixels=max_pixels)  # `is_animated` seeks among the frames
    oddities = _oddities(header, name.suffix.lower())
    row["odd"] = sum(is_odd << bit for bit, is_odd in enumerate(oddities))
    row["sha"] = np.frombuffer(hashlib.sha256(data).digest(), np.uint64)


def _oddities(header: Image.Image, suffix: str) -> tuple[bool, ...]:
    """Which of ODD an image is, by its header and the suffix of its name."""
    mode, format = header.mode, header.format or ""
    return (
        min(header.size) < TINY,
        header.width * header.height > HUGE,
        mode == "CMYK",
        mode[0] in "IF",
        mode == "P",
        header.has_transparency_data,
        mode in ("L", "LA", "1"),
        is_rotated(header),
        format != "MPO" and getattr(header, "is_animated", False),
        suffix in SUFFIXES and suffix not in _SUFFIXES.get(format, SUFFIXES),
    )
