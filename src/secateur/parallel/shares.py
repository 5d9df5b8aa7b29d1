"""Divides work among the processes of a run."""

from __future__ import annotations

from collections.abc import Sequence

from secateur.errors import RecipeError


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
        >>> from secateur.parallel.shares import micro_batches
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
        >>> from secateur.parallel.shares import micro_batches, rows_of
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
        >>> from secateur.parallel.shares import owners
        >>> owners([4, 1, 1, 2], 2)
        [0, 1, 1, 1]
    """
    busy, found = [0.0] * ranks, [0] * len(costs)
    for piece in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        found[piece] = min(range(ranks), key=lambda rank: (busy[rank], rank))
        busy[found[piece]] += costs[piece]
    return found
