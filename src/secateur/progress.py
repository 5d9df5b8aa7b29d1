"""How the engine says how far it is, without knowing who listens."""

from __future__ import annotations

from typing import Protocol

__all__ = ["Progress", "Silent"]


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
