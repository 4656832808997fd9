"""A function over many tasks in several processes: results in order, progress, named deaths."""

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from itertools import islice
from multiprocessing import connection
from typing import Any, TypeVar

from leanclip.errors import DataError

T = TypeVar("T")
R = TypeVar("R")
Note = Callable[[int], None]  # called by a task with the index of each sample before reading it

_INTERVAL = 0.25  # seconds between two updates of the progress
_IDLE = -2  # in place of an index; -1 is a sample of a stream


def in_processes(
    work: Callable[[T, Note], R],
    tasks: Iterable[T],
    workers: int,
    *,
    name: Callable[[int], str],
    progress: Callable[[int], None],
) -> Generator[R, None, None]:
    """`work(task, note)` of each task, in the tasks' order; close the generator to stop early.

    Args:
        work: a picklable function with picklable results.
        tasks: consumed at most twice the workers ahead.
        workers: processes; 0: this one.
        name: names the sample of an index in messages.
        progress: called a few times a second with the number of samples noted.

    Raises:
        DataError: a process died; the message names the samples that were being read.
    """
    reading = multiprocessing.RawArray("q", [_IDLE] * max(workers, 1))  # indices, by worker
    counts = multiprocessing.RawArray("q", max(workers, 1))
    if workers == 0:
        _start(work, reading, counts, None)
        for task in tasks:
            yield _run(task)
            progress(counts[0])
        return
    tasks, before = iter(tasks), set(multiprocessing.active_children())
    arguments = (work, reading, counts, multiprocessing.Value("i"))
    pool = ProcessPoolExecutor(workers, initializer=_start, initargs=arguments)
    try:
        futures = deque(pool.submit(_run, task) for task in islice(tasks, 2 * workers))
        while futures:
            while not wait([futures[0]], _INTERVAL).done:
                progress(sum(counts))
            yield futures.popleft().result()
            progress(sum(counts))
            futures.extend(pool.submit(_run, task) for task in islice(tasks, 1))
    except BrokenProcessPool:
        indices = sorted({index for index in reading if index != _IDLE})
        names = [name(index) if index >= 0 else "a sample of a stream" for index in indices]
        raise DataError(
            f"{' or '.join(names) or 'data'}: the process that was reading it died; if it ran out "
            f"of memory, use fewer --workers; else remove this sample"
        ) from None
    finally:
        for child in set(multiprocessing.active_children()) - before:
            child.terminate()  # shutdown alone waits for the running tasks
        pool.shutdown(cancel_futures=True)


_run_task: Callable[[Any], Any]  # of this process


def _start(work: Callable[[Any, Note], Any], reading: Any, counts: Any, started: Any) -> None:
    """Prepare a process; `started` counts the workers, None: this is the main process."""
    global _run_task
    number = 0
    if started is not None:
        with started.get_lock():
            number = started.value
            started.value += 1
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is handled by the main process
        threading.Thread(target=_end_with_parent, daemon=True).start()

    def note(index: int) -> None:
        reading[number] = index
        counts[number] += 1

    def run(task: Any) -> Any:
        result = work(task, note)
        reading[number] = _IDLE
        return result

    _run_task = run


def _end_with_parent() -> None:
    """End this process when a SIGKILL has ended its parent; the pool would wait for tasks."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    connection.wait([parent.sentinel])
    os._exit(1)


def _run(task: Any) -> Any:
    return _run_task(task)
