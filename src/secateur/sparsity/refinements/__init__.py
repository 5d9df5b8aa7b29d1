"""Refinements: find a better mask with the same number of zeros. One file each.

A refinement takes a mask that a score chose. It returns another mask that the same pattern allows,
with the same number of zeros in every row and a smaller error of the layer's outputs. Solvers then
compute the remaining weights.
"""

from __future__ import annotations

from typing import ClassVar, Protocol, runtime_checkable

from secateur.registry import Registry
from secateur.sparsity.patterns import Pattern
from secateur.types import Mask, Statistics, Weight

__all__ = ["Refinement", "refinements"]


@runtime_checkable
class Refinement(Protocol):
    """The contract of a refinement."""

    requires: ClassVar[frozenset[str]]
    """Names of the statistics it reads."""

    def refine(
        self,
        weight: Weight,
        mask: Mask,
        statistics: Statistics,
        pattern: Pattern,
        sparsity: float,
    ) -> Mask:
        """A mask of the same pattern and counts; must not change its arguments.

        Raises:
            PatternError: the refinement cannot keep the zeros of this pattern.
        """
        ...

    def working_bytes(self, shape: tuple[int, int]) -> int:
        """The most memory it takes for a weight [out, in], besides weight, mask, statistics."""
        ...


refinements: Registry[type[Refinement]] = Registry("refinement", __name__)
