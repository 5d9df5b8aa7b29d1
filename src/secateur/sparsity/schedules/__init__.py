"""Schedules: how sparsity rises while a model trains.

A schedule is a function of the share of steps that are done, from 0 to 1, of the `first` and the
`last` sparsity. Gradual pruning calls it every few steps, rounds of pruning and retraining call it
once a round. The published ones are below.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Protocol, TypeVar, runtime_checkable

from pydantic import Field

from secateur.errors import RecipeError
from secateur.registry import CheckedPart, Registry

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


@schedule
def one_shot(done: float, *, last: float) -> float:
    """s(p) = s_last at every p, 0 as well: pruned before the first step of training.

    Example:
        >>> from secateur.sparsity.schedules import one_shot
        >>> [one_shot(done, last=0.8) for done in (0.0, 0.5, 1.0)]
        [0.8, 0.8, 0.8]
    """
    return last


@schedule
def linear(done: float, *, first: float, last: float) -> float:
    """s(p) = s_last + (s_first − s_last) · (1 − p): the same amount at every step.

    Example:
        >>> from secateur.sparsity.schedules import linear
        >>> [round(linear(done, first=0.0, last=0.8), 3) for done in (0.0, 0.25, 0.5, 0.75, 1.0)]
        [0.0, 0.2, 0.4, 0.6, 0.8]
    """
    return last + (first - last) * (1 - done)


@schedule
def cubic(done: float, *, first: float, last: float) -> float:
    """s(p) = s_last + (s_first − s_last) · (1 − p)³: fast at the beginning, slow at the end.

    Paper: Zhu and Gupta 2017, "To prune, or not to prune: exploring the efficacy of pruning for
    model compression", arXiv:1710.01878, with p = (t − t₀) / (n Δt).

    Example:
        >>> from secateur.sparsity.schedules import cubic
        >>> [round(cubic(done, first=0.0, last=0.8), 3) for done in (0.0, 0.25, 0.5, 0.75, 1.0)]
        [0.0, 0.463, 0.7, 0.788, 0.8]
    """
    return last + (first - last) * (1 - done) ** 3


@schedule
def geometric(done: float, *, first: float, last: float) -> float:
    """s(p) = 1 − (1 − s_first) · ((1 − s_last) / (1 − s_first))^p: the same share of what is left.

    In n rounds, each prunes the fraction 1 − ((1 − s_last) / (1 − s_first))^(1/n) of the weights
    that are left: 33 % of them in each of 4 rounds to 80 %.

    Paper: the rounds of iterative magnitude pruning, Frankle and Carbin 2019, "The Lottery Ticket
    Hypothesis", arXiv:1803.03635, who prune 20 % of what is left. Deviation: the number of rounds
    determines the fraction, so that the last round ends exactly at the target sparsity.

    Example:
        >>> from secateur.sparsity.schedules import geometric
        >>> [round(geometric(done, first=0.0, last=0.8), 3) for done in (0.0, 0.25, 0.5, 0.75, 1.0)]
        [0.0, 0.331, 0.553, 0.701, 0.8]
    """
    if done == 1:  # 1 − (1 − s) is not s in every last bit, and the end is promised exactly
        return last
    left = (1 - last) / (1 - first)
    return min(1 - (1 - first) * left**done, last)


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
