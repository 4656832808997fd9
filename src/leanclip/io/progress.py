"""A progress bar on stderr."""

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
)


class ProgressBar:
    """A bar on stderr with steps, a note and the remaining time; hidden without a terminal.

    Args:
        label: what is done.
        total: number of steps.
        completed: steps done before.
        is_silent: hide it, for example on all ranks but the first.
    """

    def __init__(
        self, label: str, total: int, *, completed: int = 0, is_silent: bool = False
    ) -> None:
        console = Console(stderr=True)
        self.is_shown = console.is_terminal and not is_silent
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[notes]}"),
            TimeRemainingColumn(),
            console=console,
            disable=not self.is_shown,
            transient=True,
        )
        self._task = self._bar.add_task(label, total=total, completed=completed, notes="")

    def __enter__(self) -> "ProgressBar":
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def update(self, done: int, *, total: int | None = None) -> None:
        """Move the bar to `done` steps, of `total` if given."""
        self._bar.update(self._task, completed=done, total=total)

    def note(self, text: str) -> None:
        """Show a note beside the bar."""
        self._bar.update(self._task, notes=text)

    def update_bytes(self, label: str, done: int, total: int) -> None:
        """Move the bar to `done` bytes, shown in megabytes; a total of 0 is unknown."""
        self._bar.update(
            self._task,
            description=f"{label} (MB)",
            completed=done // 10**6,
            total=-(-total // 10**6) if total else None,
        )
