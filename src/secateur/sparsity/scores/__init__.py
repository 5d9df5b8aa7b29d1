"""Scores: how important is each weight? One file each; higher = keep.

A score is a function of a weight [out, in] and of the statistics that it `requires`. It returns a
float32 score [out, in]. Its keyword-only parameters can be set in a recipe.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from functools import partial
from typing import ClassVar, Protocol, TypeVar, runtime_checkable

from secateur.registry import CheckedPart, Registry, float32_bytes
from secateur.types import Score, Statistics, Weight

__all__ = ["ScoreFunction", "score", "scores"]

Function = TypeVar("Function", bound=Callable[..., Score])


@runtime_checkable
class ScoreFunction(Protocol):
    """The contract of a score."""

    requires: ClassVar[frozenset[str]]
    """Names of the statistics it reads: see `secateur.types.Statistics`."""

    whole_units: ClassVar[bool]
    """Whether it scores whole columns, so that it fits no pattern of single weights."""

    batched: ClassVar[bool]
    """Whether it also takes weights [batch, out, in], with statistics [batch, …]."""

    def __call__(self, weight: Weight, statistics: Statistics) -> Score:
        """Score every weight; must not change its arguments."""
        ...

    def working_bytes(self, shape: tuple[int, int]) -> int:
        """The most memory it takes for a weight [out, in], besides the weight and statistics."""
        ...


scores: Registry[type[ScoreFunction]] = Registry("score", __name__)


_TWO_COPIES = partial(float32_bytes, copies=2)
"""What most scores take."""


def score(
    *,
    requires: Collection[str] = (),
    whole_units: bool = False,
    batched: bool = False,
    working_bytes: Callable[[tuple[int, int]], int] = _TWO_COPIES,
) -> Callable[[Function], Function]:
    """Register a function as a score, under its own name.

    Args:
        requires: names of the statistics it reads; the engine gathers these and no others.
        whole_units: whether it scores whole columns only.
        batched: whether it also takes weights [batch, out, in], with statistics [batch, …].
        working_bytes: from the shape of a weight [out, in], the most memory that the score takes.

    Example:
        >>> from secateur.sparsity.scores import scores
        >>> scores["ria"](a=0.25), sorted(scores["ria"].requires)
        (ria(a=0.25), ['column_norm'])
    """
    return lambda function: scores.from_function(
        function,
        CheckedPart,
        requires=frozenset(requires),
        whole_units=whole_units,
        batched=batched,
        working_bytes=staticmethod(working_bytes),
    )
