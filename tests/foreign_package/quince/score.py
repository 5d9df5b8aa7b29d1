"""Magnitude times the largest input."""

from quince import MIB
from secateur.sparsity.scores import score
from secateur.types import Score, Statistics, Weight


@score(requires={"quince-peak"}, working_bytes=lambda shape: 32 * MIB)
def quince_peak(weight: Weight, statistics: Statistics) -> Score:
    """S_ij = |W_ij| · max_t |x_tj|, float32 [out, in]."""
    return weight.detach().float().abs() * statistics["quince-peak"]
