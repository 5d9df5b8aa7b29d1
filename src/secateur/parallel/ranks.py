"""The processes of a run: one alone, or several that calculate together.

Every process runs the same code. Rank 0 is the first process: it alone writes files, and it tells
the others what only it knows (`once`). A single process is `ALONE`, which does nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType
from typing import Protocol, TypeVar

from torch import Tensor

T = TypeVar("T")


class Ranks(Protocol):
    """The contract of the processes of a run, as a context manager around their work.

    All processes make the same calls in the same order. An error that leaves the context ends the
    run in every process.
    """

    @property
    def rank(self) -> int:
        """The number of this process, from 0."""
        ...

    @property
    def count(self) -> int:
        """The number of processes."""
        ...

    @property
    def here(self) -> int:
        """The number of processes on this machine, which share its memory."""
        ...

    @property
    def first(self) -> bool:
        """Whether this process writes files and reports progress."""
        ...

    def total(self, tensor: Tensor) -> None:
        """Replace a tensor in place by its sum over all processes; all get the same bits."""
        ...

    def share(self, tensor: Tensor, owner: int) -> None:
        """Replace a tensor in place by the one of process `owner`, bit for bit."""
        ...

    def gather(self, value: T) -> list[T]:
        """Return the values of all processes, by rank. A value is plain data, as JSON has it."""
        ...

    def once(self, work: Callable[[], T]) -> T:
        """Do some work in the first process alone, and return its result in all.

        The result is plain data, as JSON has it. The others wait.
        """
        ...

    def wait(self) -> None:
        """Wait until all processes reach this call."""
        ...

    def __enter__(self) -> Ranks: ...

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None: ...


class Alone:
    """A single process: nothing is summed, shared or waited for."""

    rank, count, here, first = 0, 1, 1, True

    def total(self, tensor: Tensor) -> None:
        """Leave the tensor as it is: this process has all of the sum."""

    def share(self, tensor: Tensor, owner: int) -> None:
        """Leave the tensor as it is."""

    def gather(self, value: T) -> list[T]:
        """Return the only value."""
        return [value]

    def once(self, work: Callable[[], T]) -> T:
        """Do the work."""
        return work()

    def wait(self) -> None:
        """Wait for nobody."""

    def __enter__(self) -> Alone:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Leave errors as they are."""


ALONE: Ranks = Alone()
"""The only process of a run."""
