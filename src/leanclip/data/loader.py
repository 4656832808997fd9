"""From a data set to batches, as a function of (seed, position) alone.

    visits of an epoch -> global batches -> a rank's part -> workers: read, crop, tokenise -> Batch

What a sample looks like depends on the seed and on its place in the epoch, not on which worker or
rank reads it or when: the position alone rebuilds the stream.

Shapes: B batch, L tokens, R resolution.
"""

import json
import multiprocessing
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from hashlib import blake2b
from itertools import islice
from multiprocessing.queues import Queue
from multiprocessing.util import Finalize
from pathlib import Path
from threading import Thread
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from torch.utils.data import DataLoader, get_worker_info

from leanclip.config.data import DataConfig
from leanclip.data.dataset import Dataset, Sample
from leanclip.data.decoded_image_cache import CACHE_BYTES, DecodedImageCache
from leanclip.data.skipped import Bad
from leanclip.errors import DataError, SampleError, is_shortage
from leanclip.io.threads import default_workers, is_main_thread
from leanclip.preprocess.decoding import Source
from leanclip.preprocess.images import Preprocess, evaluation_pixels, training_pixels
from leanclip.preprocess.tokenizer import END, encode, tokenize

NOT_HANDED_OVER = 71  # exit code of a worker whose batch does not get through
SHORTAGE = 72  # of one that has too little memory, or too few open files
TEXT_LENGTHS = (8, 16, 24, 32, 48, 64)  # what a batch is cut to; below a whole context

T = TypeVar("T")


class Position(NamedTuple):
    """How far a stream of batches has gone."""

    epoch: int = 0
    sample: int = 0  # samples of this epoch that are done, over all ranks


class Visit(NamedTuple):
    """One look at a sample."""

    epoch: int
    place: int  # in the epoch
    what: int | Sample


@dataclass
class Batch:
    """Pairs, ready for the device; unusable samples are left out and named in `bad`."""

    images: torch.Tensor  # (B, 3, R, R) uint8; or (B, E), a locked tower's unit features
    tokens: torch.Tensor  # (B, L) int64, cut to the longest caption; or (B, E) as above
    indices: torch.Tensor  # (B,) int64, of the samples in their data set; -1 in a stream
    labels: torch.Tensor  # (B,) int64, of class data; -1 elsewhere
    sources: torch.Tensor = field(  # (B,) int64, which one of a mixture
        default_factory=lambda: torch.empty(0, dtype=torch.int64)
    )
    groups: torch.Tensor = field(  # (B,) int64, equal for the same caption or class
        default_factory=lambda: torch.empty(0, dtype=torch.int64)
    )
    captions: list[Sequence[str]] = field(default_factory=list)  # all of them, in evaluation
    digests: torch.Tensor = field(  # (B,) int64, of image files and their words, in evaluation
        default_factory=lambda: torch.empty(0, dtype=torch.int64)
    )
    bad: list[Bad] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.indices)

    def __getstate__(self) -> dict[str, Any]:
        """On the way from a worker: of all tensors only the images are worth shared memory."""
        small = {k: v.numpy() for k, v in vars(self).items() if isinstance(v, torch.Tensor)}
        return vars(self) | small | {"images": self.images}

    def __setstate__(self, state: dict[str, Any]) -> None:
        for name, value in state.items():
            is_array = isinstance(value, np.ndarray)
            setattr(self, name, torch.from_numpy(value) if is_array else value)

    def pin_memory(self) -> "Batch":
        """In page-locked memory, from where a copy to a GPU need not be waited for."""
        self.images, self.tokens = self.images.pin_memory(), self.tokens.pin_memory()
        return self


def advance(position: Position, size: int, batch_size: int) -> Position:
    """The position after a batch; what does not fill a batch at an epoch's end is left out."""
    epoch, sample = position.epoch, position.sample + batch_size
    return Position(epoch, sample) if sample + batch_size <= size else Position(epoch + 1, 0)


def training_batches(
    dataset: Dataset,
    config: DataConfig,
    *,
    preprocess: Preprocess,
    context_length: int,
    truncate: bool,
    batch_size: int,
    seed: int,
    start: Position = Position(),  # noqa: B008, a constant
    rank: int = 0,
    world_size: int = 1,
    undecoded: Mapping[int, Bad] | None = None,
) -> Iterator[tuple[Batch, Position]]:
    """Shuffled batches without end, from `start`, each with the position after it.

    Args:
        dataset: where the samples are.
        config: crops, workers and limits.
        preprocess: of the model: side of the images, and how they look without `augment`.
        context_length: the most tokens of a caption.
        truncate: cut longer captions; else they are bad samples.
        batch_size: samples of a step over all ranks; not more than the data set has.
        seed: of the order, the crops and the choice of captions.
        start: where to begin.
        rank: whose part of each batch is wanted: every `world_size`-th sample, from the rank-th.
        world_size: how many share a batch.
        undecoded: leave the images as they are; the samples that cannot be used, by index.
    """
    size = len(dataset)
    if start.sample + batch_size > size:  # the batches were smaller when this was saved
        start = Position(start.epoch + 1, 0)
    reader = _Reader(dataset, config, preprocess, context_length, truncate, seed, undecoded)
    visits = _training_visits(dataset, batch_size, seed, start)
    position = start
    for batch in _load(reader, (part[rank::world_size] for part in visits), config.workers):
        position = advance(position, size, batch_size)
        yield batch, position


def evaluation_batches(
    dataset: Dataset,
    config: DataConfig,
    *,
    preprocess: Preprocess,
    context_length: int,
    batch_size: int,
    rank: int = 0,
    world_size: int = 1,
) -> Iterator[Batch]:
    """Every sample once, in order, as `preprocess` has it, with its first caption.

    Of several ranks each takes every `world_size`-th batch, from the rank-th: the batches are
    the same whatever the number of ranks, and so is what a model makes of them.
    """
    size = len(dataset)
    starts = range(rank * batch_size, size, world_size * batch_size)
    places = (range(n, min(n + batch_size, size)) for n in starts)
    yield from batches_at(
        dataset, config, places, preprocess=preprocess, context_length=context_length
    )


def batches_at(
    dataset: Dataset,
    config: DataConfig,
    places: Iterable[Sequence[int]],
    *,
    preprocess: Preprocess,
    context_length: int,
    undecoded: Mapping[int, Bad] | None = None,
) -> Iterator[Batch]:
    """As `evaluation_batches`, of samples by their index; `undecoded` is as in training."""
    reader = _Reader(dataset, config, preprocess, context_length, True, None, undecoded)
    visits = ([Visit(0, place, place) for place in several] for several in places)
    yield from _load(reader, visits, config.workers)


def trim(tokens: torch.Tensor) -> torch.Tensor:
    """(B, L) -> (B, L') with L' a little over the longest caption: the features are the same.

    Lengths are rounded up to a few, so that compiled graphs are reused.
    """
    longest = int((tokens == END).int().argmax(dim=1).max()) + 1 if len(tokens) else 1
    return tokens[:, : next((n for n in TEXT_LENGTHS if n >= longest), tokens.shape[1])]


def _training_visits(
    dataset: Dataset, batch_size: int, seed: int, start: Position
) -> Iterator[list[Visit]]:
    """What each batch visits; an epoch's order is drawn anew."""
    position = start
    while True:
        epoch = position.epoch
        order = dataset.visits((seed, epoch), position.sample)
        while position.epoch == epoch:
            chosen = islice(order, batch_size)
            yield [Visit(epoch, position.sample + i, what) for i, what in enumerate(chosen)]
            position = advance(position, len(dataset), batch_size)


def _load(reader: "_Reader", visits: Iterator[list[Visit]], workers: int | None) -> Iterator[Batch]:
    """Have the reader read each list of visits, in this process or in `workers` others."""
    if workers is None:
        workers = default_workers()
    try:
        reader.reading = torch.full((max(workers, 1), 2), -1).share_memory_()
        sockets = _folder_of_sockets() if workers else ""
        batches = _begin(reader, visits, workers, sockets)
    except (RuntimeError, OSError) as error:
        if not _is_shortage(error):
            raise
        raise _shortage(()) from None
    # When the workers have ended, who remove their own; at exit that is of a negative priority.
    tidy_up = Finalize(batches, shutil.rmtree, (sockets, True), exitpriority=-1)
    # PyTorch, in the main thread, raises a worker's death wherever the program is just then.
    if workers and is_main_thread():
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    while True:
        try:
            batch = next(batches)
        except StopIteration:
            return
        except (RuntimeError, OSError, EOFError) as error:  # the latter of what a dead worker sent
            workers_ = getattr(batches, "_workers", ())
            dead = {w.pid: w.exitcode for w in workers_ if w.join(1) or w.exitcode}
            tidy_up()  # a rank does not come to the end
            for pid in dead:  # PyTorch leaves what it could not map into memory
                for path in Path("/dev/shm").glob(f"torch_{pid}_*"):
                    path.unlink(missing_ok=True)
            raise _death(error, reader, dead) from error
        yield batch


def _begin(
    reader: "_Reader", visits: Iterator[list[Visit]], workers: int, sockets: str
) -> Iterator[Batch]:
    """PyTorch's loader, with its workers."""
    loader = DataLoader(
        reader,  # pyright: ignore[reportArgumentType]: a reader of lists of visits
        batch_size=None,  # a list of visits is a batch already
        sampler=visits,  # pyright: ignore[reportArgumentType]: an iterator will do
        num_workers=workers,
        prefetch_factor=4 if workers else None,
        multiprocessing_context="fork" if workers else None,  # a worker looks at its parent
        collate_fn=_as_it_is,
        pin_memory=torch.cuda.is_available(),
        worker_init_fn=partial(_begin_worker, sockets, os.getpid()),
        generator=torch.Generator(),  # it draws a seed; not from what a checkpoint restores
    )
    # A worker that is ended before it answers SIGTERM itself would answer it as this process does,
    # which takes note of it and goes on, and be waited for without end: they are born with it held.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
    try:
        return iter(loader)
    except BaseException:
        if workers:
            shutil.rmtree(sockets, ignore_errors=True)
            with suppress(OSError):
                Path(sockets).rmdir()  # rmtree must open a file, and may not have one
        raise
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _folder_of_sockets() -> str:
    """A new folder; not in a TMPDIR so long that the path of a socket, 107 bytes, has no room."""
    name = "listener-12345678"  # as multiprocessing has them
    folder = tempfile.mkdtemp(prefix="leanclip-")
    if len(os.fsencode(f"{folder}/{name}")) > 107:
        Path(folder).rmdir()
        folder = tempfile.mkdtemp(prefix="leanclip-", dir="/tmp")
    return folder


def _begin_worker(sockets: str, parent: int, _: int) -> None:
    """In a worker: signals to a whole group of processes are for the training process to answer.

    The one that it ends by is its parent's SIGTERM, or it sees that its parent is gone: PyTorch
    alone would let it wait, some seconds or with batches that nobody takes for ever. `sockets` is
    a folder for those that its batches go through, which would be left by one that is ended.
    """
    multiprocessing.current_process()._config["tempdir"] = sockets  # pyright: ignore[reportAttributeAccessIssue]
    for number in (signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])

    def tidy_up() -> None:
        if os.getppid() != parent:  # who else does it, when all workers have ended
            shutil.rmtree(sockets, ignore_errors=True)

    def end(*_: object) -> None:
        tidy_up()
        os._exit(NOT_HANDED_OVER)

    # A batch that cannot be handed over would be lost, and waited for without end.
    Queue._on_queue_feeder_error = staticmethod(end)  # pyright: ignore[reportAttributeAccessIssue]
    sys.excepthook = end  # so does the thread that gives files
    sys.unraisablehook = _end_without_memory
    Finalize(None, tidy_up, exitpriority=-1)

    def wait() -> None:
        while os.getppid() == parent:
            asked = signal.sigtimedwait([signal.SIGTERM], 1)
            if asked is not None and asked.si_pid == parent:
                os._exit(0)
        tidy_up()
        os._exit(0)

    Thread(target=wait, daemon=True).start()


def _end_without_memory(problem: Any) -> None:
    """A thread that could not even begin would be waited for without end."""
    if issubclass(problem.exc_type, MemoryError):
        os._exit(SHORTAGE)
    sys.__unraisablehook__(problem)


def _death(error: Exception, reader: "_Reader", dead: Mapping[int, int]) -> Exception:
    """What to raise for workers that are gone, by exit code: which samples they were reading."""
    if NOT_HANDED_OVER in dead.values() or (isinstance(error, EOFError) and not dead):
        return DataError(
            "a data worker could not hand over its batch: there is not enough shared memory "
            "(df -h /dev/shm; of a container: --shm-size) or too few files may be open "
            "(ulimit -n); give it more, or set data.workers lower, or to 0"
        )
    names = [
        reader.dataset.name(index) if index >= 0 else "a sample of a stream"
        for pid, index in reader.reading.tolist()
        if pid in dead
    ]
    if SHORTAGE in dead.values():
        return _shortage(names)
    if not names:
        return error
    return DataError(
        f"{', '.join(names)}: the process that was reading it died; if it was the system that "
        f"ended it for want of memory, set data.workers lower; else take this sample out"
    )


def _is_shortage(error: Exception) -> bool:
    """As `is_shortage`, and by the words that PyTorch says it in."""
    words = ("allocate memory", "Too many open files")
    return is_shortage(error) or any(word in str(error) for word in words)


def _shortage(names: Sequence[str]) -> DataError:
    return DataError(
        f"{', '.join(names) or 'data'}: there is not enough memory to read it, or too few files "
        f"may be open (ulimit -n); give it more, or set data.workers or train.batch_size lower"
    )


def _group(sample: Sample, tokens: torch.Tensor) -> int:
    """A number that samples share which are of one class, or have the same caption."""
    if sample.label is not None:
        return sample.source << 32 | sample.label
    return int.from_bytes(blake2b(tokens.numpy().tobytes(), digest_size=7).digest())


def _digest(sample: Sample) -> int:
    """Of an image file's bytes, and of the label or else the captions."""
    image = sample.image if isinstance(sample.image, bytes) else sample.image.read_bytes()
    found = blake2b(image, digest_size=8)
    words = sample.captions if sample.label is None else sample.label
    found.update(json.dumps(words).encode())
    return int.from_bytes(found.digest(), signed=True)


def _as_it_is(batch: T) -> T:
    return batch


class _Reader:
    """Reads the samples of a batch; runs in the workers. `seed` None: the evaluation transform."""

    reading: torch.Tensor  # (workers, 2) int64, shared: a process's id, the index it is reading

    def __init__(
        self,
        dataset: Dataset,
        config: DataConfig,
        preprocess: Preprocess,
        context_length: int,
        truncate: bool,
        seed: int | None,
        undecoded: Mapping[int, Bad] | None,
    ) -> None:
        self.dataset, self.config, self.seed = dataset, config, seed
        self.preprocess, self.context_length = preprocess, context_length
        self.truncate, self.undecoded = truncate, undecoded
        # Each worker would see, and keep, a part of an epoch that is drawn anew.
        is_cut = seed is not None and config.augment and undecoded is None
        has_again = is_cut and config.workers == 0
        self.kept = DecodedImageCache(
            dataset, max_pixels=config.max_pixels, room=CACHE_BYTES if has_again else 0
        )

    def __getitem__(self, visits: Sequence[Visit]) -> Batch:
        try:
            return self._read(visits)
        except (MemoryError, OSError, RuntimeError) as error:
            if not _is_shortage(error):
                raise
            if get_worker_info():
                os._exit(SHORTAGE)
            index = int(self.reading[0, 1])
            raise _shortage([self.dataset.name(index)] if index >= 0 else []) from None

    def _read(self, visits: Sequence[Visit]) -> Batch:
        info = get_worker_info()
        me = self.reading[info.id if info else 0]
        me[0] = os.getpid()
        side = 0 if self.undecoded is not None else self.preprocess.resolution
        images = torch.empty(len(visits), 3, side, side, dtype=torch.uint8)
        samples: list[Sample] = []
        indices, captions, digests, bad = [], [], [], []
        for visit in visits:
            what = visit.what
            index = me[1] = -1 if isinstance(what, Sample) else what
            sample = None
            try:
                if isinstance(what, Sample):
                    sample, image = what, what.image
                else:
                    sample, image = self.kept[what]
                caption, pixels = self._look(sample, image, visit)
                if self.seed is None and self.undecoded is None:
                    digests.append(_digest(sample))
            except SampleError as error:
                name = sample.id if sample else self.dataset.name(index)
                bad.append(Bad.of(name, error))
                continue
            if pixels is not None:
                images[len(samples)] = torch.from_numpy(pixels)
            samples.append(sample)
            indices.append(index)
            captions.append(caption)
        tokens = tokenize(captions, self.context_length, truncate=True)
        return Batch(
            images[: len(samples)],
            trim(tokens),
            torch.tensor(indices, dtype=torch.int64),
            torch.tensor([-1 if s.label is None else s.label for s in samples]).long(),
            torch.tensor([sample.source for sample in samples]).long(),
            torch.tensor([_group(s, row) for s, row in zip(samples, tokens, strict=True)]).long(),
            [sample.captions for sample in samples] if self.seed is None else [],
            torch.tensor(digests, dtype=torch.int64),
            bad,
        )

    def _look(
        self, sample: Sample, image: Source | np.ndarray, visit: Visit
    ) -> tuple[str, np.ndarray | None]:
        """A caption and the pixels (3, R, R) of a visit."""
        if sample.error:
            raise sample.error
        if self.seed is None:
            pixels = self._pixels(image, visit, None)
            return self._checked(sample, sample.captions[0]), pixels
        rng = np.random.default_rng([self.seed, visit.epoch, visit.place])
        caption = sample.captions[int(rng.integers(len(sample.captions)))]
        pixels = self._pixels(image, visit, rng)
        return self._checked(sample, caption), pixels

    def _pixels(
        self, image: Source | np.ndarray, visit: Visit, rng: np.random.Generator | None
    ) -> np.ndarray | None:
        """(3, R, R) of a visit; without `rng` as evaluation sees the image."""
        config = self.config
        if self.undecoded is not None:
            if isinstance(visit.what, int) and (bad := self.undecoded.get(visit.what)):
                raise SampleError(bad.kind, bad.reason)
            return None
        if rng is None or not config.augment:
            assert not isinstance(image, np.ndarray)  # kept, so that parts are cut from it
            return evaluation_pixels(image, self.preprocess, max_pixels=config.max_pixels)
        return training_pixels(
            image,
            self.preprocess.resolution,
            rng,
            scale=config.crop_scale,
            ratio=config.crop_ratio,
            scaled_decoding=config.scaled_decoding,
            max_pixels=config.max_pixels,
        )

    def _checked(self, sample: Sample, caption: str) -> str:
        if not caption.strip():
            raise SampleError("empty caption", f"{sample.id}: an empty caption")
        if not self.truncate and (length := len(encode(caption)) + 2) > self.context_length:
            raise SampleError(
                "long caption",
                f"{sample.id}: a caption of {length} tokens is over the context of "
                f"{self.context_length}",
            )
        return caption
