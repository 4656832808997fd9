"""Stop or save when a signal asks for it, at the edge of a step, on all ranks together.

SIGTERM, SIGINT -> save and stop   SIGUSR1 -> save and go on   a second SIGINT -> end at once

Before the first step there is nothing to save: SIGTERM and SIGINT end at once.
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
Answer = Callable[[int, FrameType | None], Any] | int  # an int: SIG_IGN or SIG_DFL


class Preempted(BaseException):
    """Training stopped because a signal asked it to; the checkpoint is written.

    Attributes:
        code: 143 after SIGTERM, 130 after SIGINT.
    """

    def __init__(self, number: int) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}")
        self.code = 128 + number


@contextmanager
def signal_handlers(answers: Mapping[signal.Signals, Answer]) -> Iterator[None]:
    """Answer signals so, by their numbers; the previous handlers come back at the end.

    Signals are the main thread's: in another one nothing changes.
    """
    if not is_main_thread():
        yield
        return
    before = {number: signal.signal(number, answer) for number, answer in answers.items()}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def nothing_to_save() -> Iterator[None]:
    """Until the loop begins: SIGTERM and SIGINT raise SystemExit, SIGUSR1 is ignored."""

    def end(number: int, _: FrameType | None) -> None:
        sys.exit(128 + number)

    with signal_handlers(dict.fromkeys(STOP_SIGNALS, end) | {signal.SIGUSR1: signal.SIG_IGN}):
        yield


class Signals:
    """What signals have asked of this process."""

    def __init__(self) -> None:
        self.stop = 0  # the number of the signal that asked to stop
        self.save = False

    def note(self, number: int, _: FrameType | None) -> None:
        """Answer a signal; a second SIGINT ends the process here."""
        if number == signal.SIGUSR1:
            self.save = True
        elif number == signal.SIGINT and self.stop == signal.SIGINT:
            os._exit(128 + number)
        else:
            self.stop = number


@contextmanager
def catch_signals() -> Iterator[Signals]:
    """What signals ask meanwhile."""
    signals = Signals()
    with signal_handlers(dict.fromkeys(HANDLED_SIGNALS, signals.note)):
        yield signals
