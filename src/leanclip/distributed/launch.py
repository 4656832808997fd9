"""One command as several ranks on this machine, and an exit code that says how it ended.

    leanclip train --num-gpus 8 -> this process -> torch.distributed.run --standalone -> 8 ranks

This process hands signals on to the ranks themselves, not to PyTorch's elastic launcher, which
would end them. In a folder that they share, each rank leaves its process id, and the first one
that ends on purpose the exit code of the job: the launcher's own says no more than "failed".
"""

import ctypes
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from types import FrameType
from typing import NoReturn

from leanclip.distributed.preemption import HANDLED_SIGNALS, signal_handlers

FOLDER = "LEANCLIP_LAUNCH_FOLDER"  # in the environment of ranks that were started here
PARENT = "LEANCLIP_LAUNCH_PARENT"  # the process that they end with
_LEFT_ALONE = 73  # exit code of a rank that knows no more than that another is gone
_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_RANK = "from leanclip.cli.main import main; main()"


def is_rank() -> bool:
    """Whether this process is one of several that a launcher started."""
    return world_size() > 1


def world_size() -> int:
    """How many processes its launcher started; 1 of one alone."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def rank() -> int:
    """The number of this process among those of its launcher; 0 of one alone."""
    return int(os.environ.get("RANK", "0"))


def launch(words: Sequence[str], *, ranks: int, max_restarts: int = 0) -> int:
    """Run `leanclip` with these words in `ranks` processes; the exit code.

    After the first SIGINT or SIGTERM the ranks save and stop; a second SIGINT ends all at once.
    """
    with TemporaryDirectory(prefix="leanclip-") as folder:
        threads = max(1, len(os.sched_getaffinity(0)) // ranks)
        environment = {"OMP_NUM_THREADS": str(threads)} | os.environ
        environment |= {FOLDER: folder, PARENT: str(os.getpid())}
        command = [sys.executable, "-m", "leanclip.distributed.launch", "--standalone"]
        command += ["--local-addr=127.0.0.1"]  # the machine's own name may lead nowhere
        command += [f"--log-dir={folder}"]  # else it leaves one of its own when it is ended
        command += [f"--nproc-per-node={ranks}", f"--max-restarts={max_restarts}", "--no-python"]
        agent = subprocess.Popen(
            [*command, sys.executable, "-c", _RANK, *words],
            env=environment,
            start_new_session=True,  # Ctrl-C reaches this process alone
        )
        asked: list[int] = []

        def hand_on(number: int, _: FrameType | None) -> None:
            is_second = number == signal.SIGINT and signal.SIGINT in asked
            asked.append(number)
            if number != signal.SIGUSR1:
                (Path(folder) / "stop").touch()  # for ranks that are not there yet
            reached = _signal_ranks(Path(folder), signal.SIGKILL if is_second else number)
            if is_second or not reached:  # nothing to save yet, or no wish to wait
                agent.kill()

        with signal_handlers(dict.fromkeys(HANDLED_SIGNALS, hand_on)):
            code = agent.wait()
        said = Path(folder) / "code"
        if said.is_file():
            return int(said.read_text())
        ending = [number for number in asked if number != signal.SIGUSR1]
        return 128 + ending[0] if ending else int(code != 0)


def join_launch() -> None:
    """Called by a rank when it starts and answers signals: leaves its process id for them.

    It ends here if the job has ended: a restart after another rank's mistake, or a late start.
    """
    if folder := os.environ.get(FOLDER):
        _end_with_parent()
        (Path(folder) / f"{rank()}.pid").write_text(str(os.getpid()))
        if _is_over():
            sys.exit(0)


def leave(code: int, words: str = "") -> NoReturn:
    """End this process on purpose, with its last words.

    Of the ranks that were started here, the first to end makes the job's code and has its words
    printed; all exit with 0, or they would be started again.
    """
    if folder := os.environ.get(FOLDER):
        try:
            with (Path(folder) / "code").open("x") as file:
                file.write(str(code))
        except FileExistsError:
            words = ""
    if words:
        print(words, file=sys.stderr)
    sys.exit(0 if folder else code)


def end_rank(code: int) -> NoReturn:
    """End this rank without waiting for what PyTorch has running in it."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def code_without_another() -> int:
    """What to exit with when another rank is gone; that one may have something to say first."""
    for _ in range(30):
        if _is_over():
            return 0
        time.sleep(0.1)
    if FOLDER in os.environ:
        return _LEFT_ALONE
    print(_left_alone(rank()), file=sys.stderr)
    return 1


def _left_alone(rank: int) -> str:
    return f"rank {rank}: another rank is gone"


def _is_over() -> bool:
    """Whether the job has ended on purpose."""
    folder = os.environ.get(FOLDER)
    return folder is not None and any((Path(folder) / name).exists() for name in ("code", "stop"))


def _end_with_parent(number: int = signal.SIGKILL) -> None:
    """Have the system send this process a signal when the one that started it is gone."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, number)
    if os.getppid() != int(os.environ[PARENT]):  # it went before this was asked
        os._exit(1)


def _signal_ranks(folder: Path, number: int) -> int:
    """Send a signal to every rank; how many there were."""
    reached = 0
    for path in folder.glob("*.pid"):
        try:
            os.kill(int(path.read_text()), number)
            reached += 1
        except (ProcessLookupError, ValueError):  # gone already, or not yet written
            continue
    return reached


def _agent(arguments: list[str]) -> int:
    """PyTorch's launcher, without its own words on a rank that failed: the rank has said it."""

    def tidy_up(_: int, __: FrameType | None) -> None:
        shutil.rmtree(os.environ[FOLDER], ignore_errors=True)  # nobody else is left to do it
        os._exit(1)  # and the ranks end with this process

    signal.signal(signal.SIGUSR2, tidy_up)
    _end_with_parent(signal.SIGUSR2)
    os.environ[PARENT] = str(os.getpid())
    import logging

    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    logging.getLogger("torch.distributed").setLevel(logging.CRITICAL)
    try:
        run.main(arguments)
    except ChildFailedError as error:
        codes = {rank: failure.exitcode for rank, failure in error.failures.items()}  # as seen
        first = min(codes, key=lambda rank: codes[rank] == _LEFT_ALONE)
        if codes[first] < 0:  # by a signal: it could not say it itself
            print(f"rank {first} ended by signal {-codes[first]}", file=sys.stderr)
        elif codes[first] == _LEFT_ALONE:
            print(_left_alone(first), file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(_agent(sys.argv[1:]))
