"""Show progress: a moving bar on a terminal, a line every few seconds elsewhere.

Both write to stderr, so that stdout holds only the result.
"""

from __future__ import annotations

import functools
import re
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise

from rich import progress as rich_progress
from rich.console import Console

from secateur.progress import Progress as Listener
from secateur.reporting.tables import duration

INTERVAL_SECONDS = 5.0
"""Seconds between two lines of progress when stderr is not a terminal."""
PREPARING = "preparing"
"""The label between two stages."""


@contextmanager
def show_progress() -> Iterator[Listener]:
    """Show the progress of a command on stderr: a bar on a terminal, lines elsewhere.

    The test uses the file itself and not rich, because rich trusts FORCE_COLOR, which many CI
    systems set.
    """
    if sys.stderr.isatty() and not Console(stderr=True).is_dumb_terminal:
        with TerminalBar() as bar:
            yield bar
    else:
        with ProgressLines() as lines:
            yield lines


def shown_note(note: str) -> str:
    """A note for people: of a tensor's name, the layer and the matrix.

    Example:
        >>> from secateur.cli.progress import shown_note
        >>> shown_note("model.layers.6.mlp.experts.3.up_proj.weight")
        'layer 6, expert 3, up_proj'
    """
    name = note.removesuffix(".weight")
    if note.endswith((".safetensors", ".bin", ".gguf")) or not re.fullmatch(r"\w+(\.\w+)+", name):
        return note
    parts = name.split(".")
    numbers = [(a, b) for a, b in pairwise(parts) if b.isdigit()]
    places = [("expert" if a == "experts" else "layer") + f" {b}" for a, b in numbers]
    return ", ".join(places + parts[-1:] * (not parts[-1].isdigit()))


class TerminalBar:
    """A moving bar with elapsed time and time left, for terminals."""

    def __init__(self) -> None:
        self.bar = rich_progress.Progress(
            rich_progress.TextColumn("{task.description:<14}"),
            rich_progress.BarColumn(),
            rich_progress.TextColumn("{task.percentage:>3.0f}%"),
            rich_progress.TimeElapsedColumn(),
            rich_progress.TextColumn("left"),
            rich_progress.TimeRemainingColumn(),
            rich_progress.TextColumn("{task.fields[note]}"),
            console=Console(file=sys.stderr),  # some stages put something else in its place
        )
        self.task: rich_progress.TaskID | None = None

    def __enter__(self) -> TerminalBar:
        self.bar.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.bar.stop()

    def start(self, label: str, steps: int) -> None:
        """Begin a stage. A stage with one step is shown as a pulsing bar."""
        self.task = self.bar.add_task(label, total=steps if steps > 1 else None, note="")

    def step(self, count: int = 1, note: str = "") -> None:
        """Some steps are done."""
        if self.task is not None:
            self.bar.update(self.task, advance=count, note=shown_note(note))

    def finish(self) -> None:
        """The stage is over."""
        if self.task is not None:
            total = self.bar.tasks[self.task].total or 1
            self.bar.update(self.task, total=total, completed=total, note="")
            self.task = None


@dataclass
class Stage:
    """A stage of the work and its progress.

    Attributes:
        label: name of the stage.
        steps: number of steps; 1 if the progress within the stage is unknown.
        started: start time in seconds.
        stepped: when the last step ended.
        done: number of finished steps.
        note: what the last step worked on.
    """

    label: str
    steps: int
    started: float
    stepped: float
    done: int = 0
    note: str = ""

    def line(self, now: float) -> str:
        """A line with name, percent, elapsed time and time left."""
        passed, waited = now - self.started, now - self.stepped
        if self.steps <= 1:
            return f"{self.label}: {duration(passed)} so far"
        done = min(self.done, self.steps)
        words = f"{self.label}: {done / self.steps:.0%} after {duration(passed)}"
        if done:
            each = (self.stepped - self.started) / done  # the clock alone must not raise it
            left = max(each - waited, 0) + each * (self.steps - done - 1)
            words += f", about {duration(left)} left" if left >= 1 else ""
        return f"{words} ({self.note})" if self.note else words


class ProgressLines:
    """A line every few seconds with stage, percent, elapsed time and time left, for logs and pipes.

    A thread prints, so that lines also appear while one step takes minutes. A stage that ends
    before its first line is not shown.

    Args:
        interval_seconds: time between two lines.
        clock: returns the time in seconds.
        write: prints one line; to stderr by default.
    """

    def __init__(
        self,
        interval_seconds: float = INTERVAL_SECONDS,
        clock: Callable[[], float] = time.monotonic,
        write: Callable[[str], None] | None = None,
    ) -> None:
        self.interval_seconds, self.clock = interval_seconds, clock
        # keep the present stderr: some stages replace it for a while
        self.write = write or functools.partial(print, file=sys.stderr, flush=True)
        self.stage = Stage(PREPARING, 1, clock(), clock())
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
        """Print a line at every interval until the command ends."""
        while not self.over.wait(self.interval_seconds):
            self.show()

    def show(self) -> None:
        """Print the progress of the stage."""
        self.shown = True
        self.write(self.stage.line(self.clock()))

    def start(self, label: str, steps: int) -> None:
        """A stage begins."""
        now = self.clock()
        self.stage, self.shown = Stage(label, steps, now, now), False

    def step(self, count: int = 1, note: str = "") -> None:
        """Some steps are done."""
        self.stage.done += count
        self.stage.stepped = self.clock()
        self.stage.note = shown_note(note)

    def finish(self) -> None:
        """End the stage. Print this if the stage was shown."""
        if self.shown:
            passed = self.clock() - self.stage.started
            self.write(f"{self.stage.label}: done in {duration(passed)}")
        self.start(PREPARING, 1)
