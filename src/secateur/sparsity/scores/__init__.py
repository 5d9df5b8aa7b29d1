"""Scores: how important is each weight? One file each; higher = keep.

A score is a frozen dataclass. It names the statistics it `requires`, and maps a weight [out, in]
and those statistics to a float32 score [out, in].
"""

from __future__ import annotations

from typing import ClassVar, Protocol, runtime_checkable

from secateur.registry import Registry
from secateur.types import Score, Statistics, Weight, float32_bytes

__all__ = ["ScoreDefaults", "ScoreFunction", "scores"]


@runtime_checkable
class ScoreFunction(Protocol):
    """The contract of a score."""

    requires: ClassVar[frozenset[str]]
    """Names of the statistics it reads: see `secateur.types.Statistics`."""

    whole_units: ClassVar[bool]
    """Whether it scores whole columns, so that it fits no pattern of single weights."""

    def __call__(self, weight: Weight, statistics: Statistics) -> Score:
        """Score every weight; must not change its arguments."""
        ...

    def working_bytes(self, shape: tuple[int, int]) -> int:
        """The most memory it takes for a weight [out, in], besides the weight and statistics."""
        ...


class ScoreDefaults:
    """What most scores share: they score single weights, and take two float32 copies of them."""

    whole_units: ClassVar[bool] = False

    def working_bytes(self, shape: tuple[int, int]) -> int:
        """Two float32 copies of the weight."""
        return 2 * float32_bytes(shape)


scores: Registry[type[ScoreFunction]] = Registry("score", __name__)
