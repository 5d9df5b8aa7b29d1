"""The processes of a run: one alone, or several that calculate together and share the work.

Every process runs the same code. Rank 0 is the first process: it alone writes files, and it tells
the others what only it knows (`once`). A single process is `ALONE`, which has nobody to wait for.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Sequence
from pathlib import Path
from threading import get_ident
from types import TracebackType
from typing import NoReturn, Protocol, TypeVar

from torch import Tensor

from secateur.errors import RankError, RecipeError

T = TypeVar("T")

REPORT = "this is a fault in secateur or in a plug-in; please report it"
"""What a user can do about calls that do not fit together."""


class Ranks(Protocol):
    """The contract of the processes of a run, as a context manager around their work.

    All processes make the same calls in the same order. An error that leaves the context ends the
    run in every process. The work of `once` makes no calls: the other processes would not make
    them. A call there raises an error, with a single process too.
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

    rank, count, here = 0, 1, 1

    def __init__(self) -> None:
        self.in_once = set[int]()  # the threads that do the work of a `once`

    @property
    def first(self) -> bool:
        """Whether this process writes files and reports progress."""
        return self.rank == 0

    def total(self, tensor: Tensor) -> None:
        """Leave the tensor as it is: this process has all of the sum."""
        self.enter("total", tensor)

    def share(self, tensor: Tensor, owner: int) -> None:
        """Leave the tensor as it is."""
        self.enter(f"share from {owner}", tensor)

    def gather(self, value: T) -> list[T]:
        """Return the only value."""
        self.enter("gather")
        return [value]

    def once(self, work: Callable[[], T]) -> T:
        """Do the work."""
        self.enter("once")
        self.in_once.add(get_ident())
        try:
            return work()
        finally:
            self.in_once.discard(get_ident())

    def wait(self) -> None:
        """Wait for nobody."""
        self.enter("wait")

    def enter(self, name: str, tensor: Tensor | None = None) -> None:
        """Begin a call that all processes make.

        Args:
            name: of the call.
            tensor: what the call changes in place.

        Raises:
            RankError: it is part of the work of a `once`, which the others do not do.
        """
        if get_ident() in self.in_once:
            raise RankError(
                f"`{name}` was called in the work of a `once`, which only one process does",
                remedy=REPORT,
            )

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


def micro_batches(windows: int, largest: int, ranks: int = 1) -> list[slice]:
    """Cut calibration windows into the micro-batches of a single process, for any number of them.

    So the forwards round in the same way. With fewer micro-batches than processes some processes
    have no windows; they still solve linears.

    Args:
        windows: number of windows.
        largest: most windows in a micro-batch.
        ranks: number of processes, to refuse too many.

    Returns:
        Ranges of windows.

    Raises:
        RecipeError: there are fewer windows than processes.

    Example:
        >>> from secateur.parallel.ranks import micro_batches
        >>> micro_batches(5, 2)
        [slice(0, 2, None), slice(2, 4, None), slice(4, 5, None)]
    """
    if windows < ranks:
        raise RecipeError(
            f"{ranks} processes have only {windows} calibration windows",
            remedy=f"use at most {windows} processes, or more --windows",
        )
    return [slice(i, min(i + largest, windows)) for i in range(0, windows, largest)]


def rows_of(rank: int, batches: Sequence[slice], ranks: int) -> list[slice]:
    """The micro-batches of one process: consecutive ones, so its windows are one range.

    If there are fewer than processes, the last processes have none.

    Args:
        rank: number of the process.
        batches: all micro-batches, from `micro_batches`.
        ranks: number of processes.

    Example:
        >>> from secateur.parallel.ranks import micro_batches, rows_of
        >>> [rows_of(rank, micro_batches(5, 2), 4) for rank in (0, 3)]
        [[slice(0, 2, None)], []]
    """
    each, more = divmod(len(batches), ranks)
    first, end = (each * number + min(number, more) for number in (rank, rank + 1))
    return list(batches[first:end])


def owners(costs: Sequence[float], ranks: int) -> list[int]:
    """Assign pieces of work to processes, so that the busiest one has little more than the others.

    The most expensive piece goes first, each to the process with the least work so far. The busiest
    process has at most 4/3 of the best possible maximum (Graham 1969).

    Args:
        costs: cost of each piece, in any unit.
        ranks: number of processes.

    Returns:
        The process of each piece; every process computes the same list.

    Example:
        >>> from secateur.parallel.ranks import owners
        >>> owners([4, 1, 1, 2], 2)
        [0, 1, 1, 1]
    """
    busy, found = [0.0] * ranks, [0] * len(costs)
    for piece in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        found[piece] = min(range(ranks), key=lambda rank: (busy[rank], rank))
        busy[found[piece]] += costs[piece]
    return found


def refuse_another_model(rank: int, folder: Path) -> NoReturn:
    """Refuse a process that reads another model than the first one.

    Raises:
        RecipeError: always.
    """
    raise RecipeError(
        f"process {rank} on {socket.gethostname()} reads another model than the first process: "
        "names, shapes or dtypes of the tensors differ",
        where=str(folder),
        remedy="give all machines the same files",
    )
