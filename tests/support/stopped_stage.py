"""A progress that stops a run at some step of its work."""

from __future__ import annotations


class StoppedError(Exception):
    """Raised by a progress that has seen enough."""


class StopAt:
    """A progress that stops after some steps of a stage, or of any; after none as it starts."""

    def __init__(self, stage: str | None, steps: int) -> None:
        self.stage, self.left, self.now = stage, steps, ""

    def start(self, label: str, steps: int) -> None:
        self.now = label
        self.count(0)

    def step(self, count: int = 1, note: str = "") -> None:
        self.count(count)

    def finish(self) -> None:
        self.now = ""

    def count(self, steps: int) -> None:
        """Stop if this was the last step."""
        if self.stage in (None, self.now):
            self.left -= steps
            if self.left <= 0:
                raise StoppedError
