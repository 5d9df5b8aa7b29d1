"""Schedules: how sparsity rises while a model trains.

A schedule is a function of the share of steps that are done, from 0 to 1, of the `first` and the
`last` sparsity. Gradual pruning calls it every few steps, rounds of pruning and retraining call it
once a round.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Protocol, TypeVar, runtime_checkable

from pydantic import Field

from secateur.errors import RecipeError
from secateur.registry import CheckedPart, Registry

__all__ = ["Schedule", "levels", "schedule", "schedules"]

Function = TypeVar("Function", bound=Callable[..., float])
Sparsity = Annotated[float, Field(ge=0, lt=1)]


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
class _Span(CheckedPart):
    """The parameters of every schedule."""

    last: Sparsity
    first: Sparsity = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.last < self.first:
            raise RecipeError(
                f"a schedule from sparsity {self.first} down to {self.last}",
                remedy="pruned weights do not come back: end at or above the sparsity of the "
                "beginning",
            )


def schedule(function: Function) -> Function:
    """Register a function as a schedule, under its own name.

    It takes the share of the steps that are done, and of the keywords `first` and `last` those that
    it needs.

    Example:
        >>> from secateur.sparsity.schedules import schedules
        >>> half_way = schedules["linear"](last=0.8, first=0.2)
        >>> half_way, half_way(0.5)
        (linear(last=0.8, first=0.2), 0.5)
    """
    return schedules.from_function(function, _Span)


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
