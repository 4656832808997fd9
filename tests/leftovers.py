"""What a command that was hurt may not leave behind: processes, temporary files, shared memory."""

import ctypes
import getpass
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

SHARED_MEMORY = Path("/dev/shm")
CACHES = {f"torchinductor_{getpass.getuser()}"}  # of PyTorch, for all processes
SECONDS = 10  # that what is ending is waited for
_PR_SET_CHILD_SUBREAPER = 36  # linux/prctl.h


class Leftovers:
    """What there was at the start, in a folder that all is written below.

    Whoever loses its parent becomes a child of this process: see `watched`.

    Args:
        folder: of everything that commands write.
        temporary: their TMPDIR.
    """

    def __init__(self, folder: Path, temporary: Path) -> None:
        self.folder, self.temporary = folder, temporary
        self.goes_on = False  # at the end, that a test sets which leaves it so
        self._processes = set(_descendants(os.getpid()))
        self._shared = _names(SHARED_MEMORY)

    def check(self, *, goes_on: bool = False) -> None:
        """Nothing is left when what is ending has ended.

        Args:
            goes_on: it was killed, and a half-written file waits for the command that goes on.
        """
        _until_empty("processes", lambda: [_said(pid, "cmdline") for pid in self.orphans()])
        _until_empty("shared memory", lambda: sorted(_names(SHARED_MEMORY) - self._shared))
        _until_empty("files in TMPDIR", lambda: sorted(_names(self.temporary) - CACHES))
        if not goes_on:
            _until_empty("temporary files", self._files)

    def orphans(self) -> list[int]:
        """The processes that are left."""
        return [pid for pid in _descendants(os.getpid()) if pid not in self._processes]

    def _files(self) -> list[Path]:
        """What is named as a file that is not yet whole."""
        return [
            path
            for path in self.folder.rglob("*")
            if path.suffix in (".part", ".tmp", ".unpacking") or ".part." in path.name
        ]


@contextmanager
def watched(folder: Path) -> Iterator[Leftovers]:
    """Be the parent of whatever a command leaves running, and check at the end what it left."""
    temporary = folder / "tmp"
    temporary.mkdir()
    libc = ctypes.CDLL(None)
    libc.prctl(_PR_SET_CHILD_SUBREAPER, 1)
    leftovers = Leftovers(folder, temporary)
    try:
        yield leftovers
        leftovers.check(goes_on=leftovers.goes_on)
    finally:
        for pid in leftovers.orphans():
            os.kill(pid, signal.SIGKILL)
        libc.prctl(_PR_SET_CHILD_SUBREAPER, 0)


def _until_empty(what: str, found: Callable[[], list]) -> None:
    deadline = time.monotonic() + SECONDS
    while left := found():
        assert time.monotonic() < deadline, f"{what} that are left: {left}"
        time.sleep(0.02)


def children(pid: int) -> list[int]:
    """The processes that one started and that have not ended."""
    found: list[int] = []
    for path in Path(f"/proc/{pid}/task").glob("*/children"):
        with suppress(OSError):
            found += [int(child) for child in path.read_text().split()]
    return [child for child in found if "State:\tZ" not in _said(child, "status")]


def _descendants(pid: int) -> Iterator[int]:
    for child in children(pid):
        yield child
        yield from _descendants(child)


def _said(pid: int, name: str) -> str:
    """What /proc says of a process; nothing of one that is gone, which counts as ended."""
    try:
        return Path(f"/proc/{pid}/{name}").read_text().replace("\0", " ")
    except OSError:
        return "State:\tZ"


def _names(folder: Path) -> set[str]:
    """What is in a folder, without the semaphores that scikit-learn's processes have anywhere."""
    return {path.name for path in folder.iterdir() if not path.name.startswith("sem.loky-")}
