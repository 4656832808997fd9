"""Work in threads, in order; and whether this is the main one."""

import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

S = TypeVar("S")
R = TypeVar("R")


def in_threads(
    read: Callable[[int, S], R], sources: Iterable[S], workers: int | None, batch_size: int
) -> Iterator[R]:
    """`read(place, source)` of each source, in order; two batches are under way at once.

    Args:
        read: runs in a thread; what it raises is raised here.
        sources: what to read; no further than needed.
        workers: threads; 0: this one; None: one per CPU core, eight at most.
        batch_size: how many will be taken at once.
    """
    if workers is None:
        workers = default_workers()
    if workers == 0:
        yield from (read(place, source) for place, source in enumerate(sources))
        return
    pool = ThreadPoolExecutor(workers, thread_name_prefix="leanclip-decode")
    try:
        futures: deque[Future[R]] = deque()
        for place, source in enumerate(sources):
            futures.append(pool.submit(read, place, source))
            if len(futures) >= 2 * batch_size:
                yield futures.popleft().result()
        while futures:
            yield futures.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def default_workers() -> int:
    """One per CPU core that this rank has, eight at most."""
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return min(8, max(1, len(os.sched_getaffinity(0)) // processes))


def is_main_thread() -> bool:
    """Whether this thread may set signal handlers."""
    return threading.current_thread() is threading.main_thread()
