"""One function over many tasks in several processes: results in order, progress, named deaths."""

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from itertools import islice
from multiprocessing import connection
from multiprocessing.process import BaseProcess
from typing import Any, TypeVar

from leanclip.errors import DataError

T = TypeVar("T")
R = TypeVar("R")
Note = Callable[[int], None]  # what a task calls with the index of each sample before reading it

_SECONDS = 0.25  # between two looks at the progress


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
        work: what to do; it and its results cross to other processes.
        tasks: as many as twice the workers are drawn ahead.
        workers: processes; 0: this one.
        name: what the sample of an index is called.
        progress: told a few times a second how many samples were noted.

    Raises:
        DataError: a process died; it names the sample that was being read.
    """
    slots = multiprocessing.RawArray("q", 3 * max(workers, 1))  # process id, index, noted

    def tick() -> None:
        progress(sum(slots[2::3]))

    if workers == 0:
        _start(work, slots, None)
        for task in tasks:
            yield _run(task)
            tick()
        return
    tasks = iter(tasks)
    pool = ProcessPoolExecutor(
        workers, initializer=_start, initargs=(work, slots, multiprocessing.Value("i"))
    )
    before = set(multiprocessing.active_children())
    children: set[BaseProcess] = set()
    try:
        futures = deque(pool.submit(_run, task) for task in islice(tasks, 2 * workers))
        while futures:
            children |= set(multiprocessing.active_children()) - before
            yield _result(futures.popleft(), tick)
            tick()
            futures.extend(pool.submit(_run, task) for task in islice(tasks, 1))
    except BrokenProcessPool:
        pool.shutdown()
        raise _death(slots, {child.pid: child.exitcode for child in children}, name) from None
    finally:
        for child in children:
            child.terminate()  # else a task that nobody waits for goes on for a while
        pool.shutdown(cancel_futures=True)


_task: tuple[Callable[[Any, Note], Any], Note]  # of a worker: the work, and how to note an index


def _start(work: Callable[[Any, Note], Any], slots: Any, counter: Any) -> None:
    """Make a process ready; without a counter it is the main one."""
    global _task
    first = 0
    if counter is not None:
        with counter.get_lock():
            first = 3 * counter.value
            counter.value += 1
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the main process's to handle
        threading.Thread(target=_end_with_parent, daemon=True).start()
    slots[first : first + 2] = [os.getpid(), -1]

    def note(index: int) -> None:
        slots[first + 1] = index
        slots[first + 2] += 1

    _task = work, note


def _end_with_parent() -> None:
    """Workers of a killed main process would wait for tasks, or write files, for ever."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    connection.wait([parent.sentinel])
    os._exit(1)


def _run(task: Any) -> Any:
    work, note = _task
    return work(task, note)


def _result(future: Future[R], tick: Callable[[], None]) -> R:
    while not wait([future], _SECONDS).done:
        tick()
    return future.result()


def _death(
    slots: Any, exits: dict[int | None, int | None], name: Callable[[int], str]
) -> DataError:
    """Which sample killed a process; when one dies, the pool terminates the others."""
    reading = dict(zip(slots[::3], slots[1::3], strict=True))
    ended = (0, None, -signal.SIGTERM)
    dead = {pid for pid in reading if exits.get(pid) not in ended} or set(reading)
    names = [
        name(index) if index >= 0 else "a sample of a stream"
        for pid, index in reading.items()
        if pid in dead
    ]
    return DataError(
        f"{' or '.join(names)}: the process that was reading it died; if it was the system that "
        f"ended it for want of memory, use fewer --workers; else take this sample out"
    )
