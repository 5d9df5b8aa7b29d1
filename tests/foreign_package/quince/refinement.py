"""The largest weights stay, whatever the score said."""

from dataclasses import dataclass
from typing import ClassVar

from quince import MIB
from secateur.sparsity.patterns import Pattern
from secateur.sparsity.refinements import refinements
from secateur.types import Mask, Statistics, Weight


@refinements.register("quince-magnitude")
@dataclass(frozen=True)
class Magnitude:
    """The mask of the pattern by |W|."""

    requires: ClassVar[frozenset[str]] = frozenset()

    def refine(
        self,
        weight: Weight,
        mask: Mask,
        statistics: Statistics,
        pattern: Pattern,
        sparsity: float,
    ) -> Mask:
        """Another mask of the same pattern and counts."""
        return pattern.mask(weight.detach().float().abs(), sparsity)

    def working_bytes(self, shape: tuple[int, int]) -> int:
        """16 MiB."""
        return 16 * MIB
