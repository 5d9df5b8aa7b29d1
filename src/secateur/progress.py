"""How the engine says how far it is, without knowing who listens."""

from __future__ import annotations

import sys
from collections.abc import Collection, Iterator
from typing import Any, Protocol, TypeVar, runtime_checkable

from secateur.errors import RecipeError


@runtime_checkable
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


class ProgressBar:
    """Shows a bar for every stage on stderr.

    Example: `secateur.prune(model, sparsity=0.5, progress=secateur.ProgressBar())`.
    """

    def __init__(self) -> None:
        self.bar: Any = None

    def start(self, label: str, steps: int) -> None:
        """A stage begins; a stage of one step shows only its time."""
        from tqdm import tqdm  # plain, not its widgets: they need a package of their own

        self.finish()
        # without a total, tqdm shows the time and no bar
        self.bar = tqdm(total=steps if steps > 1 else None, desc=label)

    def step(self, count: int = 1, note: str = "") -> None:
        """Some steps are done."""
        if self.bar is not None:
            self.bar.set_postfix_str(note, refresh=False)
            self.bar.update(count)

    def finish(self) -> None:
        """The stage is over."""
        if self.bar is not None:
            self.bar.close()
            self.bar = None


def _in_notebook() -> bool:
    """Whether a kernel of Jupyter runs this code."""
    shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    return type(shell).__name__ == "ZMQInteractiveShell"


def listener(progress: Progress | None) -> Progress:
    """Who hears of the steps of a call: what the caller gave, else a bar in a notebook.

    Raises:
        RecipeError: what the caller gave does not listen.
    """
    if isinstance(progress, Progress) and not isinstance(progress, type):
        return progress
    if progress is not None:
        raise RecipeError(
            f"progress is {progress!r}, which has no start, step and finish"[:200],
            remedy="pass secateur.ProgressBar(), or leave it out",
        )
    return ProgressBar() if _in_notebook() else Silent()


Named = TypeVar("Named")


def each_step(progress: Progress, label: str, names: Collection[Named]) -> Iterator[Named]:
    """The names of the steps of a stage. A step is reported once the loop is done with it."""
    progress.start(label, len(names))
    for name in names:
        yield name
        progress.step(note=f"{name}")
    progress.finish()


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
