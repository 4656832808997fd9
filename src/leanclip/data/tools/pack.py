"""Pack any source into shards: tar files of small JPEGs with their captions, shuffled once.

    DST/00000.tar ...   000000123.jpg with .txt (a caption) or .json ({"captions": [...]});
                        of class data .cls (the label, a number) and .txt (the class's name)
    DST/classes.txt     of class data: one name per line, by label
    DST/index.json      written last: settings, shards, their samples and bytes
    DST/skipped.jsonl   the samples that could not be used

The number in a name is the sample's place in the shuffled order. A shard is made by one process
and appears whole; all bytes are a function of the data and the settings. Until index.json is
there, pack.json has the settings, and 00000.json what is known of a finished shard.
"""

import io
import json
import os
import tarfile
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import closing
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import simplejpeg
from PIL import Image

from leanclip.config.data import DataConfig, SourceConfig
from leanclip.config.sections import to_plain
from leanclip.config.strict_yaml import dump_yaml
from leanclip.data import open_dataset
from leanclip.data.dataset import Dataset, Sample
from leanclip.data.order import shuffled
from leanclip.data.scaled_decode import image_bytes, is_rotated, open_header, open_scaled
from leanclip.data.skipped import Bad, SkipTracker
from leanclip.data.tools.parallel import Note, in_processes
from leanclip.errors import DataError, SampleError
from leanclip.io.files import atomic_write, read_json_object, split_lines, try_lock, write_text

JPEG_LIMIT = 65_535  # of a side, in pixels

Task = tuple[int, list[int | Sample]]  # the number of a shard, and its visits
Record = dict[str, Any]  # of a shard: name, samples, bytes, read (bytes of the source), skipped


def pack(
    config: DataConfig,
    destination: Path,
    *,
    side: int = 256,
    quality: int = 90,
    shard_size: int = 1000,
    seed: int = 0,
    workers: int | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Any]:
    """Write every sample of a source into shards, and return the content of index.json.

    Finished shards of an interrupted call are kept.

    Args:
        config: the source; samples of a mixture are taken once each, whatever their weights.
        destination: a new folder, or one of an earlier call with the same settings.
        side: short side of the images in pixels; smaller ones are not enlarged.
        quality: of JPEG, 1 to 100.
        shard_size: samples per shard.
        seed: of the order.
        workers: processes; 0: this one; None: `data.workers`, else one per CPU core.
        progress: called with the numbers of samples done and in all.

    Raises:
        DataError: more than `data.max_bad_fraction` is unusable; the destination has other
            content; a process died; a mixture has a streaming source.
    """
    if config.sources and (config.streaming or any(s.streaming for s in config.sources)):
        raise DataError("data.sources: pack a source with streaming: true on its own")
    if not config.streaming:  # the only length that a stream may have
        config = config.model_copy(update={"epoch_size": None})
    dataset = open_dataset(config)
    if not all(map(_one_line, dataset.classes)):
        raise DataError(f"{config.root}: a class has no name; give names in data.class_names")
    settings = {
        "format": 1,
        "source": _source(config),
        "visits": len(dataset),
        "side": side,
        "quality": quality,
        "shard_size": shard_size,
        "seed": seed,
    }
    index = _prepare(destination, settings)
    if not index:
        with try_lock(destination / "pack.json") as is_acquired:
            if not is_acquired:
                raise DataError(
                    f"{destination}: another process packs there; choose another folder"
                )
            index = read_json_object(destination / "index.json")  # it may have just ended
            if not index:
                index = _pack(dataset, config, destination, settings, workers, progress)
    _remove(destination, "[0-9]*.json", "pack.json", "*.part", ".*.part")
    return index


def _pack(
    dataset: Dataset,
    config: DataConfig,
    destination: Path,
    settings: dict[str, Any],
    workers: int | None,
    progress: Callable[[int, int], None],
) -> dict[str, Any]:
    """As `pack`, in a folder that is locked."""
    _remove(destination, "*.part", ".*.part", "skipped.jsonl")
    if workers is None:
        workers = config.workers or len(os.sched_getaffinity(0))
    records = _read_records(destination)
    before = sum(record["samples"] + len(record["skipped"]) for record in records.values())
    bad = SkipTracker(len(dataset), config.max_bad_fraction, destination / "skipped.jsonl")
    made = in_processes(
        partial(
            _make_shard,
            dataset=dataset,
            destination=destination,
            settings=settings,
            max_pixels=config.max_pixels,
        ),
        _tasks(dataset, config, settings, set(records)),
        workers,
        name=dataset.name,
        progress=lambda done: progress(before + done, len(dataset)),
    )
    try:
        for record in records.values():
            bad.add([Bad(**one) for one in record["skipped"]])
        with closing(made):
            for number, record in made:
                records[number] = record
                bad.add([Bad(**one) for one in record["skipped"]])
    except DataError:
        for path in destination.glob("[0-9]*.json"):  # made again, when their samples are mended
            if read_json_object(path)["skipped"]:
                path.unlink()
        raise
    finally:
        _remove(destination, "*.part", ".*.part")
    return _finish(destination, dataset, settings, [records[number] for number in sorted(records)])


def summary(index: dict[str, Any], destination: Path) -> str:
    """The shards that were written, and the settings to train from them."""
    data: dict[str, Any] = {"format": "shards", "root": str(destination)}
    if index["templates"]:
        data["templates"] = index["templates"]
    written = sum(shard["bytes"] for shard in index["shards"])
    read = index["source_bytes"]
    lines = [
        f"{destination}: {index['samples']:,} samples in {len(index['shards']):,} shards, "
        f"{written / 1e6:,.1f} MB (images before: {read / 1e6:,.1f} MB)"
    ]
    if index["skipped"]:
        lines.append(f"{index['skipped']:,} skipped: {destination / 'skipped.jsonl'}")
    return "\n".join([*lines, "To train from it:", "", dump_yaml({"data": data}).rstrip()])


def packed_image(data: bytes, side: int, quality: int, *, max_pixels: int) -> bytes:
    """A JPEG of the image with its short side at most `side`, by antialiased bicubic.

    An upright RGB JPEG of that size is returned unchanged.

    Raises:
        SampleError: it cannot be read, or would be too long for a JPEG.
    """
    header = open_header(data, max_pixels=max_pixels)
    is_plain = header.format == "JPEG" and header.mode == "RGB" and not is_rotated(header)
    short, long = sorted(header.size)  # `image` may be smaller
    image = open_scaled(header, side, max_pixels=max_pixels)
    if is_plain and short <= side:
        return data
    if short > side:
        short, long = side, round(side * long / short)
    width, height = (short, long) if image.width <= image.height else (long, short)
    if max(width, height) > JPEG_LIMIT:
        raise SampleError(
            "too long image", f"an image of {width}x{height} pixels is too long for its other side"
        )
    if image.size != (width, height):
        image = image.resize((width, height), Image.Resampling.BICUBIC)
    return simplejpeg.encode_jpeg(
        np.ascontiguousarray(image), quality, "RGB", colorsubsampling="420"
    )


def _make_shard(
    task: Task,
    note: Note,
    *,
    dataset: Dataset,
    destination: Path,
    settings: dict[str, Any],
    max_pixels: int,
) -> tuple[int, Record]:
    """Write one shard and its record; runs in the workers."""
    number, visits = task
    path = destination / f"{number:05d}.tar"
    record: Record = {"name": path.name, "samples": 0, "bytes": 0, "read": 0, "skipped": []}
    with atomic_write(path) as part:
        with tarfile.open(part, mode="w", format=tarfile.USTAR_FORMAT) as tar:
            for place, visit in enumerate(visits, number * settings["shard_size"]):
                note(-1 if isinstance(visit, Sample) else visit)
                sample = None
                try:
                    sample = visit if isinstance(visit, Sample) else dataset[visit]
                    if sample.error:
                        raise sample.error
                    texts = _texts(sample, dataset.classes)
                    data = image_bytes(sample)
                    side, quality = settings["side"], settings["quality"]
                    image = packed_image(data, side, quality, max_pixels=max_pixels)
                except SampleError as error:
                    name = visit.id if isinstance(visit, Sample) else dataset.name(visit)
                    name = sample.id if sample else name
                    record["skipped"].append(Bad.of(name, error)._asdict())
                    continue
                for suffix, content in {"jpg": image, **texts}.items():
                    member = tarfile.TarInfo(f"{place:09d}.{suffix}")  # time and owner are 0
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
                record["samples"] += 1
                record["read"] += len(data)
        record["bytes"] = part.stat().st_size
    write_text(path.with_suffix(".json"), json.dumps(record))
    return number, record


def _texts(sample: Sample, classes: Sequence[str]) -> dict[str, bytes]:
    """The members beside the image, by suffix."""
    if classes and sample.label is not None:
        return {"txt": _one_line(classes[sample.label]).encode(), "cls": b"%d" % sample.label}
    captions = [caption for caption in sample.captions if caption.strip()]
    if not captions:
        raise SampleError("empty caption", f"{sample.id}: an empty caption")
    if len(captions) == 1 and len(split_lines(captions[0])) == 1:
        return {"txt": captions[0].encode()}
    return {"json": json.dumps({"captions": captions}, ensure_ascii=False).encode()}


def _one_line(name: str) -> str:
    """A class name with white space collapsed."""
    return " ".join(name.split())


def _source(config: DataConfig) -> dict[str, Any]:
    """The settings, other than defaults, that determine the samples."""
    names = {*SourceConfig.model_fields, "sources", "max_pixels"}
    fields = DataConfig.model_fields
    return {
        name: value
        for name, value in to_plain(config).items()
        if name in names and getattr(config, name) != fields[name].default
    }


def _prepare(destination: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """Make the folder with its pack.json, or check an earlier one; its index if it is finished.

    Raises:
        DataError: the folder has other settings or other content.
    """
    index = read_json_object(destination / "index.json")
    earlier = index or read_json_object(destination / "pack.json")
    for key, value in settings.items() if earlier else ():
        if earlier.get(key) != value:
            raise DataError(
                f"{destination}: was packed with {key} {json.dumps(earlier.get(key))}, not "
                f"{json.dumps(value)}; remove it, or choose another folder"
            )
    if not earlier:
        if destination.exists() and (not destination.is_dir() or any(destination.iterdir())):
            raise DataError(f"{destination}: is not an empty folder; choose another")
        destination.mkdir(parents=True, exist_ok=True)
        write_text(destination / "pack.json", json.dumps(settings))
    return index


def _read_records(destination: Path) -> dict[int, Record]:
    """The records of the finished shards, by number."""
    paths = sorted(destination.glob("[0-9]*.json"))
    found = [path for path in paths if path.with_suffix(".tar").is_file()]
    return {int(path.stem): json.loads(path.read_text("utf-8")) for path in found}


def _tasks(
    dataset: Dataset, config: DataConfig, settings: dict[str, Any], done: Collection[int]
) -> Iterator[Task]:
    """The shards that are not done."""
    key = (settings["seed"],)
    visits = dataset.visits(key) if config.streaming else shuffled(len(dataset), key)
    number = 0
    while some := list(islice(visits, settings["shard_size"])):
        if number not in done:
            yield number, some
        number += 1


def _finish(
    destination: Path, dataset: Dataset, settings: dict[str, Any], records: Sequence[Record]
) -> dict[str, Any]:
    """Write the files beside the shards, index.json last."""
    if dataset.classes:
        names = "".join(f"{_one_line(name)}\n" for name in dataset.classes)
        write_text(destination / "classes.txt", names)
    skipped = [one for record in records for one in record["skipped"]]
    if skipped:  # in the order of the shards, whichever was finished first
        lines = "".join(json.dumps(one) + "\n" for one in skipped)
        write_text(destination / "skipped.jsonl", lines)
    index = settings | {
        "samples": sum(record["samples"] for record in records),
        "skipped": len(skipped),
        "templates": list(dataset.templates),
        "source_bytes": sum(record["read"] for record in records),
        "shards": [
            {key: record[key] for key in ("name", "samples", "bytes")} for record in records
        ],
    }
    write_text(destination / "index.json", json.dumps(index, indent=2) + "\n")
    return index


def _remove(destination: Path, *patterns: str) -> None:
    for pattern in patterns:
        for path in destination.glob(pattern):
            path.unlink(missing_ok=True)
