"""Magnitude times the largest input."""

from dataclasses import dataclass
from typing import ClassVar

from quince import MIB
from secateur.sparsity.scores import scores
from secateur.types import Score, Statistics, Weight


@scores.register("quince-peak")
@dataclass(frozen=True)
class PeakScore:
    """S_ij = |W_ij| · max_t |x_tj|, float32 [out, in]."""

    requires: ClassVar[frozenset[str]] = frozenset({"quince-peak"})
    whole_units: ClassVar[bool] = False

    def __call__(self, weight: Weight, statistics: Statistics) -> Score:
        """Score a weight [out, in]."""
        return weight.detach().float().abs() * statistics["quince-peak"]

    def working_bytes(self, shape: tuple[int, int]) -> int:
        """32 MiB."""
        return 32 * MIB
