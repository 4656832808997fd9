"""One command as several ranks on this machine, and an exit code that says how it ended.

    leanclip train --num-gpus 8 -> this process -> torch.distributed.run --standalone -> 8 ranks

This process hands signals on to the ranks themselves, not to PyTorch's elastic launcher, which
would end them. In a folder that they share, each rank leaves its process id, and rank 0 the exit
code that it would have had alone: the launcher's own says no more than "failed".
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from types import FrameType

FOLDER = "LEANCLIP_LAUNCH_FOLDER"  # in the environment of ranks that were started here
_RANK = "from leanclip.cli import main; main()"


def is_rank() -> bool:
    """Whether this process is one of several that a launcher started."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def launch(words: Sequence[str], *, ranks: int, max_restarts: int = 0) -> int:
    """Run `leanclip` with these words in `ranks` processes; the exit code.

    After the first SIGINT or SIGTERM the ranks save and stop; a second SIGINT ends all at once.
    """
    with TemporaryDirectory(prefix="leanclip-") as folder:
        threads = max(1, len(os.sched_getaffinity(0)) // ranks)
        environment = {"OMP_NUM_THREADS": str(threads)} | os.environ | {FOLDER: folder}
        command = [sys.executable, "-m", "leanclip.launch", "--standalone"]
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
            reached = _signal_ranks(Path(folder), signal.SIGKILL if is_second else number)
            if is_second or not reached:  # nothing to save yet, or no wish to wait
                agent.kill()

        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, hand_on)
        code = agent.wait()
        said = Path(folder) / "code"
        if said.is_file():
            return int(said.read_text())
        ending = [number for number in asked if number != signal.SIGUSR1]
        return 128 + ending[0] if ending else int(code != 0)


def join_launch() -> None:
    """Called by a rank when it starts: leaves its process id for signals."""
    if folder := os.environ.get(FOLDER):
        rank = os.environ["RANK"]
        (Path(folder) / f"{rank}.pid").write_text(str(os.getpid()))
        if rank == "0":
            (Path(folder) / "code").unlink(missing_ok=True)


def leave_launch(code: int) -> int:
    """Called by a rank when it ends on purpose; gives the code that it should exit with.

    A rank that stopped because it was asked to exits with 0, or it would be started again.
    """
    folder = os.environ.get(FOLDER)
    if folder is None:
        return code
    if os.environ["RANK"] == "0":
        (Path(folder) / "code").write_text(str(code))
    elif code == 2:
        time.sleep(3)  # all ranks have the same to say of a user's mistake; the first one says it
    return 0 if code > 128 else code


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
    import logging

    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    logging.getLogger("torch.distributed").setLevel(logging.CRITICAL)
    try:
        run.main(arguments)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode < 0:  # by a signal: it could not say it itself
            print(f"rank {rank} ended by signal {-failure.exitcode}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(_agent(sys.argv[1:]))
