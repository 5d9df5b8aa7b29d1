"""Time several things in turns, so that other load on the machine affects all of them alike.

    ours, theirs = alternate([product, torch_product], seconds_of, min, turns=5)

Every measurement of the package that compares times goes through `alternate`. The lowest time says
what a call can take, since other work can only lengthen it; the median says what it usually takes.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import TypeVar

Thing = TypeVar("Thing")
Measured = TypeVar("Measured")
Result = TypeVar("Result")

LEAST_TURNS = 2


def seconds_of(call: Callable[[], object], now: Callable[[], float] = time.perf_counter) -> float:
    """Seconds of a call, by a clock that returns seconds."""
    started = now()
    call()
    return now() - started


def alternate(
    things: Sequence[Thing],
    clock: Callable[[Thing], Measured],
    statistic: Callable[[list[Measured]], Result],
    *,
    turns: int,
    seconds: float | None = None,
) -> list[Result]:
    """Measure all things once, then all again, and so on.

    Args:
        things: calls, models or processes.
        clock: measures one of them once, such as `seconds_of`.
        statistic: of all measurements of a thing, such as `min` or `statistics.median`.
        turns: how often each is measured, at most.
        seconds: if given, no turn begins after this many seconds, but there are at least two.

    Returns:
        The statistic of each thing.

    Example:
        >>> from secateur.timing import alternate
        >>> alternate([[3, 1, 2], [6, 5, 4]], list.pop, min, turns=2)
        [1, 4]
    """
    found: list[list[Measured]] = [[] for _ in things]
    end = None if seconds is None else time.perf_counter() + seconds
    for turn in range(turns):
        if end is not None and turn >= LEAST_TURNS and time.perf_counter() > end:
            break
        # the things take turns, so that a slow minute of the machine hits all of them
        for own, thing in zip(found, things, strict=True):
            own.append(clock(thing))
    return [statistic(own) for own in found]
