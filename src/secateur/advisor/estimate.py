"""Numbers with a range, and where they come from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

__all__ = ["ESTIMATED", "MEASURED", "PUBLISHED", "Basis", "Estimate", "Figure"]

Basis = Literal["measured here", "published", "estimated"]

MEASURED: Basis = "measured here"
PUBLISHED: Basis = "published"
ESTIMATED: Basis = "estimated"


@dataclass(frozen=True)
class Estimate:
    """A number that lies between two others.

    Attributes:
        low: the least.
        typical: the one to count with.
        high: the most.
    """

    low: float
    typical: float
    high: float

    @classmethod
    def exact(cls, value: float) -> Estimate:
        """A number without a range."""
        return cls(value, value, value)

    def map(self, function: Callable[[float], float]) -> Estimate:
        """Apply a function; a falling one swaps the ends."""
        ends = [function(self.low), function(self.high)]
        return Estimate(min(ends), function(self.typical), max(ends))

    def __add__(self, other: Estimate) -> Estimate:
        """The sum; both low ends together, both high ends together."""
        return Estimate(self.low + other.low, self.typical + other.typical, self.high + other.high)

    def __mul__(self, factor: float) -> Estimate:
        """The multiple by a number that is not negative."""
        return Estimate(self.low * factor, self.typical * factor, self.high * factor)

    def larger(self, other: Estimate) -> Estimate:
        """The larger one, end by end."""
        return Estimate(
            max(self.low, other.low),
            max(self.typical, other.typical),
            max(self.high, other.high),
        )


@dataclass(frozen=True)
class Figure:
    """A number that the advice shows.

    Attributes:
        value: with its range.
        unit: such as `ms`.
        basis: measured here, published or estimated.
        source: the formula, or the place where it was published.
    """

    value: Estimate
    unit: str
    basis: Basis
    source: str
