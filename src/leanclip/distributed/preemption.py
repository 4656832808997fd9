"""Signals: save or stop after the current step, on all ranks together.

SIGTERM, SIGINT -> save and stop   SIGUSR1 -> save and continue   second SIGINT -> exit at once

Before the first step there is nothing to save: SIGTERM and SIGINT exit at once.
"""

import os
import signal
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import FrameType
from typing import Any

from leanclip.io.threads import is_main_thread

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)
HANDLED_SIGNALS = (*STOP_SIGNALS, signal.SIGUSR1)
Handler = Callable[[int, FrameType | None], Any] | int  # an int: SIG_IGN or SIG_DFL


class Preempted(BaseException):
    """Training was stopped by a signal after it saved a checkpoint.

    Attributes:
        code: the exit code: 143 for SIGTERM, 130 for SIGINT.
    """

    def __init__(self, number: int) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}")
        self.code = 128 + number


@contextmanager
def signal_handlers(handlers: Mapping[signal.Signals, Handler]) -> Iterator[None]:
    """Set signal handlers within a block; outside the main thread this does nothing."""
    if not is_main_thread():
        yield
        return
    previous = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


@contextmanager
def nothing_to_save() -> Iterator[None]:
    """Within the block SIGTERM and SIGINT raise SystemExit, and SIGUSR1 is ignored."""

    def end(number: int, _: FrameType | None) -> None:
        sys.exit(128 + number)

    with signal_handlers(dict.fromkeys(STOP_SIGNALS, end) | {signal.SIGUSR1: signal.SIG_IGN}):
        yield


@contextmanager
def deferred_signals() -> Iterator[None]:
    """Within the block SIGTERM and SIGINT wait for its end.

    For imports of PyTorch, whose C++ code aborts if a signal handler raises in it.
    """
    received: list[int] = []
    with signal_handlers(dict.fromkeys(STOP_SIGNALS, lambda number, _: received.append(number))):
        yield
    for number in received:
        signal.raise_signal(number)


class Signals:
    """The signals that this process received."""

    def __init__(self) -> None:
        self.stop = 0  # number of the signal that asks to stop
        self.save = False

    def note(self, number: int, _: FrameType | None) -> None:
        """The signal handler; exits at a second SIGINT."""
        if number == signal.SIGUSR1:
            self.save = True
        elif number == signal.SIGINT and self.stop == signal.SIGINT:
            os._exit(128 + number)
        else:
            self.stop = number


@contextmanager
def catch_signals() -> Iterator[Signals]:
    """Collect signals within the block."""
    signals = Signals()
    with signal_handlers(dict.fromkeys(HANDLED_SIGNALS, signals.note)):
        yield signals
