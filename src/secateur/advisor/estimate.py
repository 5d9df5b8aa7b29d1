"""Numbers with a range, and where they come from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

MEASURED = "measured here"
PUBLISHED = "published"
ESTIMATED = "estimated"


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

    def times(self, other: Estimate) -> Estimate:
        """The product; both low ends together, both high ends together."""
        return Estimate(self.low * other.low, self.typical * other.typical, self.high * other.high)

    def larger(self, other: Estimate) -> Estimate:
        """The larger one, end by end."""
        return Estimate(
            max(self.low, other.low),
            max(self.typical, other.typical),
            max(self.high, other.high),
        )
