"""Any source as shards: tar files of small JPEGs with their captions, shuffled once.

    DST/00000.tar ...   000000123.jpg with .txt (a caption) or .json ({"captions": [...]});
                        of class data .cls (the label, a number) and .txt (the class's name)
    DST/classes.txt     of class data: a name a line, by label
    DST/index.json      written last: what it was made of, the shards, their samples and bytes
    DST/skipped.jsonl   the samples that could not be used

The number in a name is the sample's place in the shuffled order. A shard is made by one process
and appears whole; the bytes of everything depend on the data and the settings alone.
"""

import io
import json
import os
import tarfile
from collections.abc import Callable, Iterator
from contextlib import closing
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
from leanclip.data.scaled_decode import image_bytes, is_turned, open_header, open_reduced
from leanclip.data.skipped import Bad, SkipTracker
from leanclip.data.tools.parallel import Note, in_processes
from leanclip.errors import DataError, SampleError
from leanclip.io.files import atomic_write, read_json_object, split_lines, try_lock, write_text

JPEG_LIMIT = 65_535  # of a side, in pixels

Task = tuple[int, list[int | Sample]]  # the number of a shard, and what is in it


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
    """Write every sample of a source into shards; gives what index.json holds.

    Shards that an earlier start finished are kept. `progress` is told (done, of how many).

    Args:
        config: the source; samples of a mixture are taken once each, whatever their weights.
        destination: a folder, new or of an earlier start with the same settings.
        side: short side of the images in pixels; smaller ones are not enlarged.
        quality: of JPEG, 1 to 100.
        shard_size: samples of a shard.
        seed: of the order.
        workers: processes; 0: this one; null: `data.workers`, else one per CPU core.
        progress: called now and then with samples done and of how many.

    Raises:
        DataError: more than `data.max_bad_fraction` is unusable; the destination holds something
            else; a process died; a mixture has a source that is read as a stream.
    """
    if config.sources and (config.streaming or any(s.streaming for s in config.sources)):
        raise DataError("data.sources: pack a source with streaming: true on its own")
    if not config.streaming:  # a stream may not know its length but by this
        config = config.model_copy(update={"epoch_size": None})
    dataset = open_dataset(config)
    if not all(map(_one_line, dataset.classes)):
        raise DataError(f"{config.root}: a class has no name; give names in data.class_names")
    facts = {
        "format": 1,
        "source": _source(config),
        "visits": len(dataset),
        "side": side,
        "quality": quality,
        "shard_size": shard_size,
        "seed": seed,
    }
    if _begin(destination, facts):
        return json.loads((destination / "index.json").read_text("utf-8"))
    with try_lock(destination / "pack.json") as is_acquired:
        if not is_acquired:
            raise DataError(f"{destination}: another process packs there; choose another folder")
        if (destination / "index.json").is_file():  # it has just ended
            _clear(destination)
            return json.loads((destination / "index.json").read_text("utf-8"))
        _sweep(destination)
        return _pack(dataset, config, destination, facts, workers, progress)


def _pack(
    dataset: Dataset,
    config: DataConfig,
    destination: Path,
    facts: dict[str, Any],
    workers: int | None,
    progress: Callable[[int, int], None],
) -> dict[str, Any]:
    """As `pack`, in a folder that is this process's."""
    side, quality, shard_size = facts["side"], facts["quality"], facts["shard_size"]
    if workers is None:
        workers = config.workers or len(os.sched_getaffinity(0))
    maker = _ShardMaker(dataset, destination, side, quality, shard_size, config.max_pixels)
    records = _read_records(destination)
    tasks = _tasks(dataset, config, facts, records)
    before = sum(record["samples"] + len(record["skipped"]) for record in records.values())
    bad = SkipTracker(len(dataset), config.max_bad_fraction, destination / "skipped.jsonl")
    made = in_processes(
        maker,
        tasks,
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
        _forget_bad_shards(destination)
        raise
    finally:
        _sweep(destination)
    return _finish(destination, dataset, facts, [records[number] for number in sorted(records)])


def summary(index: dict[str, Any], destination: Path) -> str:
    """What was written, and the settings to train from it."""
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

    A JPEG that is so already, in RGB and upright, is given back as it is.

    Raises:
        SampleError: it cannot be read, or would be too long for a JPEG.
    """
    header = open_header(data, max_pixels=max_pixels)
    is_plain = header.format == "JPEG" and header.mode == "RGB" and not is_turned(header)
    short, long = sorted(header.size)  # of the whole; what is decoded may be smaller
    image = open_reduced(header, side, max_pixels=max_pixels)
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


class _ShardMaker:
    """Makes one shard; runs in the workers."""

    def __init__(
        self,
        dataset: Dataset,
        destination: Path,
        side: int,
        quality: int,
        shard_size: int,
        max_pixels: int,
    ) -> None:
        self.dataset, self.destination, self.shard_size = dataset, destination, shard_size
        self.side, self.quality, self.max_pixels = side, quality, max_pixels

    def __call__(self, task: Task, note: Note) -> tuple[int, dict[str, Any]]:
        number, visits = task
        path = self.destination / f"{number:05d}.tar"
        record = {"name": path.name, "samples": 0, "bytes": 0, "read": 0, "skipped": []}
        with atomic_write(path) as part:
            with tarfile.open(part, mode="w", format=tarfile.USTAR_FORMAT) as tar:
                for place, visit in enumerate(visits, number * self.shard_size):
                    note(-1 if isinstance(visit, Sample) else visit)
                    self._add(tar, place, visit, record)
            record["bytes"] = part.stat().st_size
        write_text(path.with_suffix(".json"), json.dumps(record))
        return number, record

    def _add(
        self, tar: tarfile.TarFile, place: int, visit: int | Sample, record: dict[str, Any]
    ) -> None:
        """Add a sample's members to a shard, or what is wrong with it to the record."""
        sample = None
        try:
            sample = visit if isinstance(visit, Sample) else self.dataset[visit]
            if sample.error:
                raise sample.error
            texts = self._texts(sample)
            data = image_bytes(sample)
            image = packed_image(data, self.side, self.quality, max_pixels=self.max_pixels)
        except SampleError as error:
            name = sample.id if sample else self.dataset.name(visit if type(visit) is int else -1)
            record["skipped"].append(Bad.of(name, error)._asdict())
            return
        for suffix, content in {"jpg": image, **texts}.items():
            member = tarfile.TarInfo(f"{place:09d}.{suffix}")  # of time 0, nobody's
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
        record["samples"] += 1
        record["read"] += len(data)

    def _texts(self, sample: Sample) -> dict[str, bytes]:
        """The members beside the image, by suffix."""
        if self.dataset.classes and sample.label is not None:
            name = _one_line(self.dataset.classes[sample.label])
            return {"txt": name.encode(), "cls": str(sample.label).encode()}
        captions = [caption for caption in sample.captions if caption.strip()]
        if not captions:
            raise SampleError("empty caption", f"{sample.id}: an empty caption")
        if len(captions) == 1 and len(split_lines(captions[0])) == 1:
            return {"txt": captions[0].encode()}
        return {"json": json.dumps({"captions": captions}, ensure_ascii=False).encode()}


def _one_line(name: str) -> str:
    """A class's name with single spaces in it."""
    return " ".join(name.split())


def _source(config: DataConfig) -> dict[str, Any]:
    """The settings that say which samples there are."""
    names = {*SourceConfig.model_fields, "sources", "max_pixels"}
    defaults = {name: field.default for name, field in DataConfig.model_fields.items()}
    plain = to_plain(config)
    return {
        name: value
        for name, value in plain.items()
        if name in names and getattr(config, name) != defaults[name]
    }


def _begin(destination: Path, facts: dict[str, Any]) -> bool:
    """Make the folder ready, or take up an earlier start in it; true where all is done.

    Raises:
        DataError: it holds something else.
    """
    index, start = destination / "index.json", destination / "pack.json"
    for path in (index, start):
        if not path.is_file():
            continue
        earlier = read_json_object(path)
        for key, value in facts.items():
            if earlier.get(key) != value:
                raise DataError(
                    f"{destination}: was packed with {key} {json.dumps(earlier.get(key))}, not "
                    f"{json.dumps(value)}; remove it, or choose another folder"
                )
        if path is index:
            _clear(destination)
            _sweep(destination)
            return True
        return False
    if destination.exists() and (not destination.is_dir() or any(destination.iterdir())):
        raise DataError(f"{destination}: is not an empty folder; choose another")
    destination.mkdir(parents=True, exist_ok=True)
    write_text(start, json.dumps(facts))
    return False


def _read_records(destination: Path) -> dict[int, dict[str, Any]]:
    """What is known of the finished shards, by number; what is left of others is removed."""
    (destination / "skipped.jsonl").unlink(missing_ok=True)
    records = {}
    for path in sorted(destination.glob("[0-9]*.json")):
        if path.with_suffix(".tar").is_file():
            records[int(path.stem)] = json.loads(path.read_text("utf-8"))
    return records


def _tasks(
    dataset: Dataset, config: DataConfig, facts: dict[str, Any], done: dict[int, dict[str, Any]]
) -> Iterator[Task]:
    """The shards that are not done, with what is in them."""
    key = (facts["seed"],)
    every = dataset.visits(key) if config.streaming else shuffled(len(dataset), key)
    finished, number = set(done), 0
    while visits := list(islice(every, facts["shard_size"])):
        if number not in finished:
            yield number, visits
        number += 1


def _forget_bad_shards(destination: Path) -> None:
    """Have shards with skipped samples made again, when these were mended."""
    for record in destination.glob("[0-9]*.json"):
        if json.loads(record.read_text("utf-8"))["skipped"]:
            record.unlink()


def _finish(
    destination: Path, dataset: Dataset, facts: dict[str, Any], records: list[dict[str, Any]]
) -> dict[str, Any]:
    """Write what stands beside the shards, the index last, and remove the records."""
    if dataset.classes:
        write_text(
            destination / "classes.txt", "".join(f"{_one_line(n)}\n" for n in dataset.classes)
        )
    skipped = [one for record in records for one in record["skipped"]]
    (destination / "skipped.jsonl").unlink(missing_ok=True)
    if skipped:  # in the order of the shards, whichever was done first
        lines = "".join(json.dumps(one) + "\n" for one in skipped)
        write_text(destination / "skipped.jsonl", lines)
    index = facts | {
        "samples": sum(record["samples"] for record in records),
        "skipped": len(skipped),
        "templates": list(dataset.templates),
        "source_bytes": sum(record["read"] for record in records),
        "shards": [
            {key: record[key] for key in ("name", "samples", "bytes")} for record in records
        ],
    }
    write_text(destination / "index.json", json.dumps(index, indent=2) + "\n")
    _clear(destination)
    return index


def _clear(destination: Path) -> None:
    for path in (*destination.glob("[0-9]*.json"), *destination.glob("pack.json")):
        path.unlink(missing_ok=True)


def _sweep(destination: Path) -> None:
    """Remove what processes that were ended left half-written."""
    for path in (*destination.glob("*.part"), *destination.glob(".*.part")):
        path.unlink(missing_ok=True)
