"""Refinements: find a better mask with the same number of zeros. One file each.

A refinement is a function of a mask that a score chose. It returns another mask that the same
pattern allows, with the same number of zeros in every row and a smaller error of the layer's
outputs. Solvers then compute the remaining weights.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import ClassVar, Protocol, TypeVar, runtime_checkable

from secateur.registry import CheckedPart, Registry
from secateur.sparsity.patterns import Pattern
from secateur.types import Mask, Statistics, Weight

__all__ = ["Refinement", "refinement", "refinements"]

Function = TypeVar("Function", bound=Callable[..., Mask])


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


def refinement(
    *, requires: Collection[str] = (), working_bytes: Callable[[tuple[int, int]], int]
) -> Callable[[Function], Function]:
    """Register a function as a refinement, under its own name.

    Its arguments are those of `Refinement.refine`, and keyword-only parameters of its own.

    Args:
        requires: names of the statistics it reads.
        working_bytes: from the shape of a weight [out, in], the most memory that it takes.
    """
    declared = {"requires": frozenset(requires), "working_bytes": staticmethod(working_bytes)}
    return lambda function: refinements.from_function(function, CheckedPart, "refine", **declared)
