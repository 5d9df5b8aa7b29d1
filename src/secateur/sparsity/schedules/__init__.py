"""Schedules: how sparsity rises while a model trains. One file each.

A schedule is a frozen dataclass with the first and the last sparsity. It maps the share of steps
that are done, from 0 to 1, to a sparsity. Gradual pruning calls it every few steps, rounds of
pruning and retraining call it once a round.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from secateur.errors import RecipeError
from secateur.registry import Registry

__all__ = ["Schedule", "Span", "levels", "schedules"]


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
        """The sparsity when this share of the steps is done, 0 to 1."""
        ...


schedules: Registry[type[Schedule]] = Registry("schedule", __name__)


@dataclass(frozen=True)
class Span:
    """The first and the last sparsity: the base of schedules.

    Args:
        last: the sparsity at the end, at least 0 and below 1.
        first: the sparsity at the beginning.

    Raises:
        RecipeError: a sparsity is outside [0, 1), or the last is below the first.
    """

    last: float
    first: float = 0.0

    def __post_init__(self) -> None:
        first, last = self.first, self.last
        if not 0 <= first < 1 or not 0 <= last < 1:
            raise RecipeError(
                f"a schedule from sparsity {first} to {last}",
                remedy="give fractions of zeros, at least 0 and below 1",
            )
        if last < first:
            raise RecipeError(
                f"a schedule from sparsity {first} down to {last}",
                remedy="pruned weights do not come back: end at or above the sparsity of the "
                "beginning",
            )


def levels(schedule: Schedule, rounds: int) -> list[float]:
    """The sparsity after each round; the last one is the schedule's last sparsity.

    Raises:
        RecipeError: `rounds` is below 1.

    Example:
        >>> from secateur.sparsity.schedules import levels, schedules
        >>> [round(sparsity, 2) for sparsity in levels(schedules["geometric"](0.8), 4)]
        [0.33, 0.55, 0.7, 0.8]
    """
    if rounds < 1:
        raise RecipeError(f"{rounds} rounds of pruning", remedy="give 1 or more")
    return [schedule(number / rounds) for number in range(1, rounds + 1)]
