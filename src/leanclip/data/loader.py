"""From a data set to batches, as a function of (seed, position) alone.

    order of an epoch -> global batches -> this rank's part -> workers: crop, tokenise -> Batch

Crops and captions depend on the seed and on a sample's place in the epoch, not on which worker or
rank reads it or when: the position alone rebuilds the stream.
"""

import atexit
import errno
import math
import os
import signal
import threading
import time
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import cycle, islice
from multiprocessing.connection import wait
from multiprocessing.context import ForkContext
from multiprocessing.process import BaseProcess
from typing import Any, TypeVar

import torch
from torch.utils.data import DataLoader

from leanclip.config.data import DataConfig
from leanclip.data.batch import Batch, Position
from leanclip.data.batch_reader import BatchReader, Visit, lacks_memory, shortage_error
from leanclip.data.batch_sizes import BatchSize, BatchSizes
from leanclip.data.dataset import Dataset
from leanclip.data.skipped import Bad
from leanclip.errors import DataError
from leanclip.io.threads import default_workers, is_main_thread
from leanclip.preprocess.images import Preprocess
from leanclip.preprocess.text import Tokenizer

PREFETCH = 4  # batches that each worker reads ahead

T = TypeVar("T")


def training_batches(
    dataset: Dataset,
    config: DataConfig,
    *,
    preprocess: Preprocess,
    tokenizer: Tokenizer,
    truncate: bool,
    batch_size: int,
    seed: int,
    start: Position = Position(),  # noqa: B008, a constant
    rank: int = 0,
    world_size: int = 1,
    known_bad: Mapping[int, Bad] | None = None,
) -> Generator[tuple[Batch, Position], None, None]:
    """Shuffled batches without end, from `start`, each with the position after it.

    Closing the generator ends the workers.

    Args:
        dataset: the samples.
        config: crops, workers and limits.
        preprocess: the model's resolution, and the transform without `augment`.
        tokenizer: of the model; captions are cut to its context length.
        truncate: cut longer captions; otherwise they are bad samples.
        batch_size: samples per step over all ranks, at most the size of the data set; with
            several lengths in `config.patches`, of the longest (see `BatchSizes`).
        seed: of the order, the crops and the choice of captions.
        start: where to begin.
        rank: takes every `world_size`-th sample of each batch, from the rank-th.
        world_size: number of ranks that share a batch.
        known_bad: leave the images out; these samples, by index, are known to be bad.
    """
    sizes = BatchSizes(len(dataset), batch_size, seed, config.patches or ())
    reader = BatchReader(dataset, config, preprocess, tokenizer, truncate, seed, known_bad)
    visits = (part[rank::world_size] for part in _training_visits(dataset, sizes, start))
    own = [BatchSize(-(-samples // world_size), patches) for samples, patches in sizes.sizes]
    batches = _load(reader, visits, config.workers, own)
    for batch, (_, _, position) in zip(batches, sizes.batches(start), strict=False):
        yield batch, position


def evaluation_batches(
    dataset: Dataset,
    config: DataConfig,
    *,
    preprocess: Preprocess,
    tokenizer: Tokenizer,
    batch_size: int,
    rank: int = 0,
    world_size: int = 1,
) -> Iterator[Batch]:
    """Every sample once, in order, with the evaluation transform and its first caption.

    Each rank takes every `world_size`-th batch, from the rank-th: the composition of batches, and
    so a model's features, do not depend on the number of ranks.
    """
    size = len(dataset)
    starts = range(rank * batch_size, size, world_size * batch_size)
    places = [range(first, min(first + batch_size, size)) for first in starts]
    return batches_at(dataset, config, places, preprocess=preprocess, tokenizer=tokenizer)


def batches_at(
    dataset: Dataset,
    config: DataConfig,
    places: Sequence[Sequence[int]],
    *,
    preprocess: Preprocess,
    tokenizer: Tokenizer,
    known_bad: Mapping[int, Bad] | None = None,
) -> Iterator[Batch]:
    """Batches of these indices, as `evaluation_batches`; `known_bad` as in `training_batches`."""
    reader = BatchReader(dataset, config, preprocess, tokenizer, True, None, known_bad)
    visits = ([Visit(0, index, index) for index in batch] for batch in places)
    largest = BatchSize(max(map(len, places), default=0), None)
    return _load(reader, visits, config.workers, [largest])


def _training_visits(dataset: Dataset, sizes: BatchSizes, start: Position) -> Iterator[list[Visit]]:
    """The visits of each global batch; every epoch has an order of its own."""
    order, order_epoch = iter(()), None
    for (samples, patches), (epoch, first), _ in sizes.batches(start):
        if epoch != order_epoch:
            order, order_epoch = dataset.visits((sizes.seed, epoch), first), epoch
        chosen = enumerate(islice(order, samples), first)
        yield [Visit(epoch, place, what, patches) for place, what in chosen]


def _load(
    reader: BatchReader,
    visits: Iterable[list[Visit]],
    workers: int | None,
    sizes: Sequence[BatchSize],
) -> Iterator[Batch]:
    """Read lists of visits, of these sizes at most, in this process or in `workers` others."""
    if workers is None:
        workers = default_workers()
    if workers > 0:
        slot = max(math.prod(reader.shape(*size)) for size in sizes)
        yield from _load_in_workers(reader, visits, workers, slot)
        return
    for one in visits:
        batch = reader.read(one)
        yield batch.pin_memory() if torch.cuda.is_available() else batch


def _load_in_workers(
    reader: BatchReader, visits: Iterable[list[Visit]], count: int, slot_size: int
) -> Iterator[Batch]:
    """Read lists of visits in `count` processes, which end with this generator.

    The images of a list take at most `slot_size` bytes.

    Raises:
        DataError: a worker died, there is too little memory, or too few files may be open.
    """
    slots = PREFETCH * count + 1  # batches that workers may write, and the one being taken
    workers, batches = _Workers(), None
    # At exit multiprocessing would send SIGTERM, which workers ignore, and wait for them.
    atexit.register(workers.kill)
    try:
        reader.share(count, slots, slot_size)
        with workers.raising_deaths():
            loader = DataLoader(
                reader,  # pyright: ignore[reportArgumentType]: its keys are a slot and visits
                batch_size=None,  # a list of visits is a batch already
                sampler=zip(cycle(range(slots)), visits),  # pyright: ignore[reportArgumentType]
                num_workers=count,
                prefetch_factor=PREFETCH,
                multiprocessing_context=workers,
                collate_fn=_identity,
                worker_init_fn=partial(_begin_worker, os.getpid()),
                generator=torch.Generator(),  # the default one is part of checkpoints
            )
            batches = iter(loader)
        for slot in cycle(range(slots)):
            with workers.raising_deaths():
                batch = next(batches, None)
            if batch is None:
                return
            if isinstance(batch, DataError):
                raise batch
            yield reader.take(slot, batch)
    except (RuntimeError, OSError, EOFError) as error:
        if dead := workers.dead(seconds=1):
            raise _death(reader, [process.pid for process in dead]) from error
        if lacks_memory(error) or getattr(error, "errno", None) == errno.ENOSPC:  # of /dev/shm
            raise shortage_error("data", error) from None
        raise
    finally:
        del batches  # PyTorch ends its workers when its iterator is deleted
        workers.kill()
        atexit.unregister(workers.kill)


class _Workers(ForkContext):
    """Gives PyTorch's loader its processes, and keeps them, to see which one died."""

    def __init__(self) -> None:
        super().__init__()
        self.created: list[BaseProcess] = []

    def Process(self, *args: Any, **options: Any) -> BaseProcess:  # pyright: ignore
        process = super().Process(*args, **options)
        self.created.append(process)
        return process

    @property
    def started(self) -> list[BaseProcess]:
        """The processes without one that could not be started."""
        return [process for process in self.created if process.pid is not None]

    def dead(self, seconds: float = 0) -> list[BaseProcess]:
        """The workers that failed or were killed; waits this long for the first one."""
        ended = wait([process.sentinel for process in self.started], seconds)
        failed = [process for process in self.started if process.sentinel in ended]
        for process in failed:
            process.join()  # the sentinel may be ready before the exit code
        return [process for process in failed if process.exitcode]

    @contextmanager
    def raising_deaths(self) -> Iterator[None]:
        """Raise RuntimeError in the main thread as soon as a worker dies, but only in this block.

        PyTorch's own handler of SIGCHLD would raise it anywhere, such as amid a checkpoint. With no
        handler, the rest of a message that the worker had begun to write would be awaited forever.
        """
        if not is_main_thread():  # PyTorch checks every five seconds
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
        """End the workers that have not ended by themselves."""
        for process in self.started:
            process.kill()
            process.join()


def _begin_worker(parent: int, _: int) -> None:
    """In a worker: leave signals to the training process, and end with it.

    Terminals and schedulers send signals to all processes of a job. PyTorch's watchdog alone would
    not end a worker that waits to write a batch.
    """
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _death(reader: BatchReader, pids: Sequence[int | None]) -> DataError:
    """The error for workers that died, with the samples that they were reading."""
    names = [reader.name(index) for pid, index in reader.reading.tolist() if pid in pids]
    return DataError(
        f"{', '.join(names) or 'data'}: the process that was reading it died; if the system ended "
        f"it for lack of memory, set data.workers lower; otherwise remove this sample"
    )


def _identity(batch: T) -> T:
    return batch
