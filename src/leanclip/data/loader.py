"""From a data set to batches, as a function of (seed, position) alone.

    visits of an epoch -> global batches -> a rank's part -> workers: read, crop, tokenise -> Batch

What a sample looks like depends on the seed and on its place in the epoch, not on which worker or
rank reads it or when: the position alone rebuilds the stream.

Shapes: B batch, L tokens, R resolution.
"""

import ctypes
import os
import signal
import sys
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import islice
from multiprocessing.connection import wait
from multiprocessing.context import ForkContext
from multiprocessing.process import BaseProcess
from multiprocessing.util import Finalize
from typing import Any, TypeVar

import torch
from torch.utils.data import DataLoader

from leanclip.config.data import DataConfig
from leanclip.data.batch import Batch, Position, advance
from leanclip.data.batch_reader import BatchReader, Packed, Visit, lacks_memory, shortage_error
from leanclip.data.dataset import Dataset
from leanclip.data.skipped import Bad
from leanclip.errors import DataError
from leanclip.io.threads import default_workers, is_main_thread
from leanclip.preprocess.images import Preprocess

_PR_SET_PDEATHSIG = 1  # linux/prctl.h

T = TypeVar("T")


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
) -> Generator[tuple[Batch, Position], None, None]:
    """Shuffled batches without end, from `start`, each with the position after it.

    Closing it ends the workers.

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
    reader = BatchReader(dataset, config, preprocess, context_length, truncate, seed, undecoded)
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
    reader = BatchReader(dataset, config, preprocess, context_length, True, None, undecoded)
    visits = ([Visit(0, place, place) for place in several] for several in places)
    yield from _load(reader, visits, config.workers)


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


def _load(reader: BatchReader, visits: Iterator[list[Visit]], count: int | None) -> Iterator[Batch]:
    """Have the reader read each list of visits, in this process or in `count` others.

    Raises:
        DataError: a worker died, or there is too little memory or there are too few files.
    """
    if count is None:
        count = default_workers()
    workers = _Workers()
    # At exit multiprocessing sends its children SIGTERM, which they ignore, and waits for them.
    kill = Finalize(None, workers.kill, exitpriority=0)
    batches = None
    try:
        while True:
            try:
                with workers.raising_deaths():
                    if batches is None:
                        batches = _begin(reader, visits, count, workers)
                    batch = next(batches)
                    if isinstance(batch, Packed):
                        batch = batch.unpack()
            except StopIteration:
                return
            except (RuntimeError, OSError, EOFError) as error:
                if names := _names_of_dead(reader, workers.dead(1)):
                    raise _death(names) from error
                workers.kill()  # what they would do at their end may lack the same
                is_cut_off = isinstance(error, EOFError | ConnectionError)  # on its way from there
                if not is_cut_off and not lacks_memory(error):
                    raise
                raise shortage_error("data", error) from None
            if isinstance(batch, DataError):
                workers.kill()
                raise batch
            yield batch
    finally:
        del batches  # PyTorch ends its workers when nothing refers to its iterator
        kill()


def _begin(
    reader: BatchReader, visits: Iterator[list[Visit]], count: int, workers: "_Workers"
) -> "Iterator[Batch | Packed | DataError]":
    """PyTorch's loader, with its workers."""
    reader.reading = torch.full((max(count, 1), 2), -1).share_memory_()
    loader = DataLoader(
        reader,  # pyright: ignore[reportArgumentType]: a reader of lists of visits
        batch_size=None,  # a list of visits is a batch already
        sampler=visits,  # pyright: ignore[reportArgumentType]: an iterator will do
        num_workers=count,
        prefetch_factor=4 if count else None,
        multiprocessing_context=workers if count else None,
        collate_fn=_as_it_is,
        pin_memory=torch.cuda.is_available(),
        worker_init_fn=partial(_begin_worker, os.getpid()),
        generator=torch.Generator(),  # it draws a seed; not from what a checkpoint restores
    )
    return iter(loader)


class _Workers(ForkContext):
    """The processes that PyTorch starts, to see when they die and to end them."""

    def __init__(self) -> None:
        super().__init__()
        self.started: list[BaseProcess] = []

    def Process(self, *args: Any, **options: Any) -> BaseProcess:  # pyright: ignore
        process = super().Process(*args, **options)
        self.started.append(process)
        return process

    def dead(self, seconds: float = 0) -> list[BaseProcess]:
        """Those that ended other than by themselves, waiting so long for the first one."""
        begun = [process for process in self.started if process.pid is not None]
        ended = wait([process.sentinel for process in begun], seconds)
        for process in begun:
            if process.sentinel in ended:
                process.join()  # its files are closed, it may not be quite gone
        return [process for process in begun if process.exitcode]

    @contextmanager
    def raising_deaths(self) -> Iterator[None]:
        """Raise RuntimeError as soon as a worker is dead, in the main thread; only meanwhile.

        PyTorch's own handler of SIGCHLD would raise it wherever the program is just then, in the
        midst of a step or a checkpoint; without one the rest of a message would be waited for.
        """
        if not is_main_thread():  # PyTorch looks every five seconds
            yield
            return

        def check(*_: object) -> None:
            if self.dead():
                raise RuntimeError("a data worker died")

        before = signal.getsignal(signal.SIGCHLD)
        signal.signal(signal.SIGCHLD, check)
        try:
            check()
            yield
        finally:
            signal.signal(signal.SIGCHLD, before)

    def kill(self) -> None:
        """End those that have not ended."""
        for process in self.started:
            if process.pid is not None:
                process.kill()
                process.join()


def _begin_worker(parent: int, _: int) -> None:
    """In a worker: signals to a whole group of processes are for the training process to answer.

    A worker ends when PyTorch asks it to, or with its parent, by the kernel: PyTorch's watchdog
    alone would let one wait for ever whose batches nobody takes.
    """
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)
    # Of the thread that hands over shared memory: who waits for it would do so for ever.
    sys.excepthook = lambda *_: os._exit(1)


def _names_of_dead(reader: BatchReader, dead: Sequence[BaseProcess]) -> list[str]:
    """Of the samples that dead workers were reading."""
    if not dead:
        return []
    ids = {process.pid for process in dead}
    slots = [index for pid, index in reader.reading.tolist() if pid in ids]
    return [reader.name(index) for index in slots] or ["data"]


def _death(names: Sequence[str]) -> DataError:
    return DataError(
        f"{', '.join(names)}: the process that was reading it died; if it was the system that "
        f"ended it for want of memory or shared memory (df -h /dev/shm; of a container: "
        f"--shm-size), set data.workers lower; else take this sample out"
    )


def _as_it_is(batch: T) -> T:
    return batch
