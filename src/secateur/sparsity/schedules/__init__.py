"""Schedules: how does sparsity rise while there is training in between? One file each.

A schedule is a frozen dataclass that knows the sparsity at the beginning and at the end, and maps
the share of the way that is done, from 0 to 1, to the sparsity that is due. Gradual pruning asks
it every few steps, rounds of pruning and retraining ask it once a round.
"""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from secateur.errors import RecipeError
from secateur.registry import Registry

__all__ = ["Schedule", "check_span", "levels", "schedules"]


@runtime_checkable
class Schedule(Protocol):
    """The contract of a schedule: it never falls, and ends exactly at `last`."""

    @property
    def last(self) -> float:
        """The sparsity at the end."""
        ...

    @property
    def first(self) -> float:
        """The sparsity before anything is done."""
        ...

    def __call__(self, done: float) -> float:
        """The sparsity that is due when this share of the way is done, 0 to 1."""
        ...


schedules: Registry[type[Schedule]] = Registry("schedule", __name__)


def check_span(first: float, last: float) -> None:
    """Refuse sparsities that no schedule can lead from and to.

    Raises:
        RecipeError: one lies outside [0, 1), or the last is below the first.
    """
    if not 0 <= first < 1 or not 0 <= last < 1:
        raise RecipeError(
            f"a schedule from sparsity {first} to {last}",
            remedy="give fractions of zeros, at least 0 and below 1",
        )
    if last < first:
        raise RecipeError(
            f"a schedule from sparsity {first} down to {last}",
            remedy="pruned weights do not come back: end at or above the sparsity of the beginning",
        )


def levels(schedule: Schedule, rounds: int) -> list[float]:
    """The sparsity after each of so many rounds; the last is the schedule's.

    Raises:
        RecipeError: there is no round.

    Example:
        >>> from secateur.sparsity.schedules import levels, schedules
        >>> [round(sparsity, 2) for sparsity in levels(schedules["geometric"](0.8), 4)]
        [0.33, 0.55, 0.7, 0.8]
    """
    if rounds < 1:
        raise RecipeError(f"{rounds} rounds of pruning", remedy="give 1 or more")
    return [schedule(number / rounds) for number in range(1, rounds + 1)]
