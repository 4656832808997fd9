"""Locks among processes."""

import multiprocessing
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from leanclip.io.files import lock_file, try_lock


def _add_one(path: Path) -> None:
    for _ in range(50):
        with lock_file(path.with_suffix(".lock")):
            path.write_text(str(int(path.read_text()) + 1))


def test_a_lock_holds_between_processes_and_is_not_inherited(tmp_path: Path) -> None:
    path = tmp_path / "count"
    path.write_text("0")
    context = multiprocessing.get_context("fork")
    with lock_file(path.with_suffix(".lock")):
        started = [context.Process(target=_add_one, args=(path,)) for _ in range(3)]
        for process in started:
            process.start()
        assert path.read_text() == "0"
    for process in started:
        process.join(30)
    assert path.read_text() == "150"


@contextmanager
def holder(path: Path, lock=try_lock, *, forks: bool = False) -> Iterator[int]:
    """A process that holds a lock, which it may have forked another one with; gives its id."""
    ready, waits = os.pipe(), os.pipe()
    if (child := os.fork()) == 0:
        try:
            with lock(path):
                if forks and os.fork() == 0:
                    os.write(ready[1], b"x")
                    os.close(waits[1])
                    os.read(waits[0], 1)  # until the test's end
                    os._exit(0)
                os.write(ready[1], b"x")
                os.close(waits[1])
                os.read(waits[0], 1)
        finally:
            os._exit(0)
    for _ in range(1 + forks):
        assert os.read(ready[0], 1) == b"x"
    try:
        yield child
    finally:
        os.close(waits[1])
        os.waitpid(child, 0)
        for end in (*ready, waits[0]):
            os.close(end)


def is_free(path: Path) -> bool:
    with try_lock(path) as is_acquired:
        return is_acquired


@pytest.mark.parametrize("lock", [try_lock, lock_file])
@pytest.mark.parametrize("forks", [False, True])
def test_a_lock_ends_with_its_process_whatever_that_has_forked(
    tmp_path: Path, lock, forks: bool
) -> None:
    path = tmp_path / "new" / "lock"
    with holder(path, lock, forks=forks) as pid:
        assert not is_free(path)
        os.kill(pid, signal.SIGKILL)
        os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
        assert is_free(path)
    assert is_free(path)


def test_a_forked_process_neither_has_nor_releases_the_lock(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    lock = try_lock(path)
    assert lock.__enter__()
    if (child := os.fork()) == 0:
        is_taken = not is_free(path)
        lock.__exit__(None, None, None)  # as the block's end does in a process that goes on
        os._exit(0 if is_taken else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert not is_free(path)
    lock.__exit__(None, None, None)
    assert is_free(path)


def test_a_file_that_is_a_lock_keeps_its_content(tmp_path: Path) -> None:
    path = tmp_path / "pack.json"
    path.write_text("{}")
    with try_lock(path) as is_acquired:
        assert is_acquired
        assert not is_free(path)
    assert path.read_text() == "{}"
