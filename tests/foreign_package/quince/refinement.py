"""The largest weights stay, whatever the score said."""

from quince import MIB
from secateur.sparsity.patterns import Pattern
from secateur.sparsity.refinements import refinement
from secateur.types import Mask, Statistics, Weight


@refinement(working_bytes=lambda shape: 16 * MIB)
def quince_magnitude(
    weight: Weight, mask: Mask, statistics: Statistics, pattern: Pattern, sparsity: float
) -> Mask:
    """The mask of the pattern by |W|."""
    return pattern.mask(weight.detach().float().abs(), sparsity)
