"""Start one command as several ranks on this machine, by PyTorch's elastic launcher.

    leanclip train --num-gpus 8 -> this process, with PyTorch's agent in it -> 8 ranks

The agent starts the ranks and restarts all of them if one crashes. Signals are forwarded here,
because the agent would kill a rank that takes longer than 30 s to save. A rank that ends on purpose
exits with 0, or it would be restarted; the job's exit code goes through a store in this process.
"""

import ctypes
import logging
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from leanclip.distributed import rank
from leanclip.distributed.preemption import HANDLED_SIGNALS, signal_handlers

_LAUNCHER = "LEANCLIP_LAUNCHER"  # in the environment of ranks: process id and port of the store
_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_RANK = """
import os, signal
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
os.environ["{name}"] = "{pid} {port}"
from leanclip.cli.main import main
main()
"""


def launch(arguments: Sequence[str], *, ranks: int, max_restarts: int = 0) -> int:
    """Run `leanclip` with these arguments in `ranks` processes and return the exit code.

    On the first SIGINT or SIGTERM the ranks save and stop; a second SIGINT kills them.
    """
    from torch.distributed import TCPStore, run  # pyright: ignore[reportPrivateImportUsage]
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    logging.getLogger("torch.distributed").setLevel(logging.CRITICAL)  # ranks report their errors
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    script = _RANK.format(name=_LAUNCHER, pid=os.getpid(), port=store.port)
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // ranks)))
    options = ["--standalone", "--local-addr=127.0.0.1"]  # the host name may not resolve
    options += [f"--nproc-per-node={ranks}", f"--max-restarts={max_restarts}", "--no-python"]
    options += [f"--log-dir={os.devnull}", "--signals-to-handle=SIGQUIT"]  # not those forwarded

    def forward(number: int, _: object) -> None:
        is_second = store.add(f"signal {number}", 1) > 1 and number == signal.SIGINT
        if number != signal.SIGUSR1:
            store.compare_set("code", "", str(128 + number))  # ranks that start later end at once
        children = Path("/proc/thread-self/children").read_text().split()
        for child in children:
            os.kill(int(child), signal.SIGKILL if is_second else number)
        if is_second or (number != signal.SIGUSR1 and not children):
            sys.exit(128 + number)

    failed = ""
    with signal_handlers(dict.fromkeys(HANDLED_SIGNALS, forward)):
        try:
            run.main([*options, sys.executable, "-c", script, *arguments])
        except ChildFailedError as error:
            failed = ", ".join(f"rank {n}: {one.exitcode}" for n, one in error.failures.items())
    if store.check(["code"]):
        return int(store.get("code"))
    if failed:
        print(f"exit codes of failed ranks (negative: signals): {failed}", file=sys.stderr)
    return int(bool(failed))


def join_launch() -> None:
    """Called by a rank that can handle signals: unblock them, and end with the launcher.

    Exits if the job has ended, for example if this rank was restarted after an error of another.
    """
    if _LAUNCHER not in os.environ:
        return
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != int(os.environ[_LAUNCHER].split()[0]):  # it died before
        os._exit(1)
    store = _store()  # imports PyTorch, in which a handler may not raise
    signal.pthread_sigmask(signal.SIG_UNBLOCK, HANDLED_SIGNALS)
    if store.check(["code"]):
        sys.exit(0)


def leave(code: int, message: str = "") -> NoReturn:
    """End this process on purpose with an exit code and a message.

    Of the ranks that `launch` started, the first to end sets the job's code and prints its message.
    """
    if _LAUNCHER in os.environ:
        store = _store()
        if store.add("ended", 1) > 1:
            sys.exit(0)
        store.set("code", str(code))
        code = 0
    if message:
        print(message, file=sys.stderr)
    sys.exit(code)


def end_rank(code: int) -> NoReturn:
    """End this rank without waiting for PyTorch's threads."""
    sys.stdout.flush()
    os._exit(code)


def end_lost_rank() -> NoReturn:
    """End a rank whose error only says that another one is gone; `launch` reports which failed."""
    if _LAUNCHER in os.environ:
        end_rank(0 if _store().check(["code"]) else 1)
    print(f"rank {rank()}: another rank is gone", file=sys.stderr)
    end_rank(1)


def _store():
    from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]

    return TCPStore("127.0.0.1", int(os.environ[_LAUNCHER].split()[1]), is_master=False)
