"""How long work is shown while it runs: a moving bar on a terminal, a line now and then elsewhere.

Both renderings write to stderr, so that stdout holds only the result.
"""

from __future__ import annotations

import functools
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from secateur.cli.rendering import stderr
from secateur.progress import Progress as Listener
from secateur.reporting.wording import duration

__all__ = ["ProgressBar", "ProgressLines", "show_progress"]

INTERVAL_SECONDS = 5.0
"""The longest silence off a terminal."""
PREPARING = "preparing"
"""What is shown between two stages."""


@contextmanager
def show_progress() -> Iterator[Listener]:
    """Show the progress of a command on stderr: a bar on a terminal, lines elsewhere.

    What asks is the file itself, not rich: rich believes FORCE_COLOR, which many CI systems set.
    """
    if sys.stderr.isatty() and not stderr.is_dumb_terminal:
        with ProgressBar() as bar:
            yield bar
    else:
        with ProgressLines() as lines:
            yield lines


class ProgressBar:
    """A moving bar with the time that has passed and the time left. For terminals."""

    def __init__(self) -> None:
        self.bar = Progress(
            TextColumn("{task.description:<14}"),
            BarColumn(),
            TextColumn("{task.percentage:>3.0f}%"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
            console=Console(file=sys.stderr),  # some stages put something else in its place
        )
        self.task: TaskID | None = None

    def __enter__(self) -> ProgressBar:
        self.bar.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.bar.stop()

    def start(self, label: str, steps: int) -> None:
        """A stage begins; one of a single step is shown as a bar that pulses."""
        self.task = self.bar.add_task(label, total=steps if steps > 1 else None, note="")

    def step(self, count: int = 1, note: str = "") -> None:
        """Some steps are done."""
        if self.task is not None:
            self.bar.update(self.task, advance=count, note=note)

    def finish(self) -> None:
        """The stage is over."""
        if self.task is not None:
            total = self.bar.tasks[self.task].total or 1
            self.bar.update(self.task, total=total, completed=total, note="")
            self.task = None


@dataclass
class Stage:
    """A stage of the work, and how far it is.

    Attributes:
        label: its name.
        steps: how many there are; 1 if nobody knows how far the stage is until it ends.
        started: the time when it began, in seconds.
        done: steps that are done.
        note: what the last step worked on.
    """

    label: str
    steps: int
    started: float
    done: int = 0
    note: str = ""

    def line(self, now: float) -> str:
        """Name, percent, time passed, time left."""
        passed = now - self.started
        if self.steps <= 1:
            return f"{self.label}: {duration(passed)} so far"
        done = min(self.done, self.steps)
        words = f"{self.label}: {done / self.steps:.0%} after {duration(passed)}"
        if done:
            words += f", about {duration(passed * (self.steps - done) / done)} left"
        return f"{words} ({self.note})" if self.note else words


class ProgressLines:
    """A line every few seconds: stage, percent, time passed, time left. For logs and pipes.

    A thread prints, so that a line comes also while one step takes minutes. A stage that is over
    before its first line is not mentioned.

    Args:
        interval_seconds: time between two lines.
        clock: seconds that pass.
        write: prints one line; to stderr by default.
    """

    def __init__(
        self,
        interval_seconds: float = INTERVAL_SECONDS,
        clock: Callable[[], float] = time.monotonic,
        write: Callable[[str], None] | None = None,
    ) -> None:
        self.interval_seconds, self.clock = interval_seconds, clock
        # stderr as it is now: some stages put something else in its place for a while
        self.write = write or functools.partial(print, file=sys.stderr, flush=True)
        self.stage = Stage(PREPARING, 1, clock())
        self.shown = False
        self.over = threading.Event()
        self.thread = threading.Thread(target=self.print_lines, daemon=True)

    def __enter__(self) -> ProgressLines:
        self.thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.over.set()
        self.thread.join()

    def print_lines(self) -> None:
        """Print a line at every interval, until the command is over."""
        while not self.over.wait(self.interval_seconds):
            self.show()

    def show(self) -> None:
        """Print how far the stage is."""
        self.shown = True
        self.write(self.stage.line(self.clock()))

    def start(self, label: str, steps: int) -> None:
        """A stage begins."""
        self.stage, self.shown = Stage(label, steps, self.clock()), False

    def step(self, count: int = 1, note: str = "") -> None:
        """Some steps are done."""
        self.stage.done += count
        self.stage.note = note

    def finish(self) -> None:
        """The stage is over; says so where the stage was shown."""
        if self.shown:
            passed = self.clock() - self.stage.started
            self.write(f"{self.stage.label}: done in {duration(passed)}")
        self.start(PREPARING, 1)
