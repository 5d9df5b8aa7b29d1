"""A progress that stops a run within a stage."""

from __future__ import annotations


class StoppedError(Exception):
    """Raised by a progress that has seen enough."""


class StopAt:
    """A progress that stops a stage after some steps."""

    def __init__(self, stage: str, steps: int) -> None:
        self.stage, self.steps, self.now = stage, steps, ""

    def start(self, label: str, steps: int) -> None:
        self.now = label

    def step(self, count: int = 1, note: str = "") -> None:
        if self.now == self.stage:
            self.steps -= count
            if self.steps <= 0:
                raise StoppedError

    def finish(self) -> None:
        self.now = ""
