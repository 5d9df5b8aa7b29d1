"""How the engine says how far it is, without knowing who listens."""

from __future__ import annotations

from typing import Protocol

__all__ = ["Labelled", "Progress", "Silent"]


class Progress(Protocol):
    """Hears of every step of long work."""

    def start(self, label: str, steps: int) -> None:
        """A stage of `steps` equal steps begins."""
        ...

    def step(self, count: int = 1, note: str = "") -> None:
        """`count` steps are done; `note` says where the work is."""
        ...

    def finish(self) -> None:
        """The stage is over."""
        ...


class Silent:
    """Listens to nothing."""

    def start(self, label: str, steps: int) -> None:
        """Ignore."""

    def step(self, count: int = 1, note: str = "") -> None:
        """Ignore."""

    def finish(self) -> None:
        """Ignore."""


class Labelled:
    """Puts a name before the label of every stage, for work that consists of several runs.

    Args:
        progress: receives the steps.
        name: what the stages belong to.
    """

    def __init__(self, progress: Progress, name: str) -> None:
        self.progress, self.name = progress, name

    def start(self, label: str, steps: int) -> None:
        """A stage begins."""
        self.progress.start(f"{self.name}: {label}", steps)

    def step(self, count: int = 1, note: str = "") -> None:
        """Some steps are done."""
        self.progress.step(count, note)

    def finish(self) -> None:
        """The stage is over."""
        self.progress.finish()
