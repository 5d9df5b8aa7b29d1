"""Uniform: every linear gets the target sparsity."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from secateur.sparsity.allocation import AllocationDefaults, DenseLayer, Kept, allocations
from secateur.sparsity.allocation.budget import Granularity


@allocations.register("uniform")
@dataclass(frozen=True)
class Uniform(AllocationDefaults):
    """s_i = s for every linear i; observes nothing of the model."""

    reach = 0.0

    def observe(self, layer: DenseLayer) -> dict[str, Tensor]:
        """Nothing to keep."""
        return {}

    def allocate(
        self, kept: Kept, grains: Mapping[str, Granularity], sparsity: float
    ) -> dict[str, float]:
        """The same for all."""
        return dict.fromkeys(grains, sparsity)

    def working_bytes(self, weights: int, itemsize: int) -> int:
        """None."""
        return 0

    def tokens(self, calibration: int, linears: int) -> int:
        """None."""
        return 0
