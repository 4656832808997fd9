"""Ordered work in threads."""

import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

S = TypeVar("S")
R = TypeVar("R")


def map_in_threads(
    read: Callable[[int, S], R], sources: Iterable[S], workers: int | None, batch_size: int
) -> Iterator[R]:
    """Yield `read(index, source)` of each source, in order, reading two batches ahead.

    Args:
        read: called in a thread; its exceptions are raised here.
        sources: consumed as needed.
        workers: number of threads; 0: none; None: one per CPU core, at most eight.
        batch_size: results that the caller takes at once.
    """
    if workers is None:
        workers = default_workers()
    if workers == 0:
        yield from (read(index, source) for index, source in enumerate(sources))
        return
    pool = ThreadPoolExecutor(workers, thread_name_prefix="leanclip-decode")
    try:
        futures: deque[Future[R]] = deque()
        for index, source in enumerate(sources):
            futures.append(pool.submit(read, index, source))
            if len(futures) >= 2 * batch_size:
                yield futures.popleft().result()
        while futures:
            yield futures.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def default_workers() -> int:
    """One per CPU core of this rank, at most eight."""
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return min(8, max(1, len(os.sched_getaffinity(0)) // processes))


def is_main_thread() -> bool:
    """Whether this thread may set signal handlers."""
    return threading.current_thread() is threading.main_thread()
