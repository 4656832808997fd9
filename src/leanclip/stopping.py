"""Stop or save when a signal asks for it, at the edge of a step, on all ranks together.

SIGTERM, SIGINT -> save and stop   SIGUSR1 -> save and go on   a second SIGINT -> end at once

Before the first step there is nothing to save: SIGTERM and SIGINT end at once.
"""

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType


class Stopped(BaseException):
    """Training stopped because a signal asked it to; the checkpoint is written.

    Attributes:
        code: 143 after SIGTERM, 130 after SIGINT.
    """

    def __init__(self, number: int) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}")
        self.code = 128 + number


@contextmanager
def nothing_to_save() -> Iterator[None]:
    """Until the loop begins: SIGTERM and SIGINT raise SystemExit, SIGUSR1 is ignored."""

    def end(number: int, _: FrameType | None) -> None:
        sys.exit(128 + number)

    answers = {signal.SIGINT: end, signal.SIGTERM: end, signal.SIGUSR1: signal.SIG_IGN}
    before = {number: signal.signal(number, answer) for number, answer in answers.items()}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class Signals:
    """What signals have asked of this process; the previous handlers come back at the end."""

    def __init__(self) -> None:
        self.stop = 0  # the number of the signal that asked to stop
        self.save = False
        self._before: dict[int, object] = {}

    def __enter__(self) -> "Signals":
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
            self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # pyright: ignore[reportArgumentType]: what it gave

    def _note(self, number: int, _: FrameType | None) -> None:
        if number == signal.SIGUSR1:
            self.save = True
        elif number == signal.SIGINT and self.stop == signal.SIGINT:
            os._exit(128 + number)
        else:
            self.stop = number
