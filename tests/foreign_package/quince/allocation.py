"""Later layers lose more."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from quince import MIB
from secateur.sparsity.allocation import DenseLayer, Kept, allocations
from secateur.sparsity.allocation.budget import Granularity


@allocations.register("quince-slope")
@dataclass(frozen=True)
class Slope:
    """From s − reach in the first layer to s + reach in the last.

    Args:
        reach: how far sparsity may lie from the target.
    """

    reach: float = 0.125
    requires: ClassVar[frozenset[str]] = frozenset()
    uses: ClassVar[frozenset[str]] = frozenset()
    judged_tokens: ClassVar[int] = 0

    def observe(self, layer: DenseLayer) -> dict[str, Tensor]:
        """The number of the layer, for each of its linears."""
        number = {n: next(int(x) for x in n.split(".") if x.isdigit()) for n in layer.weights}
        return {name: torch.tensor(float(index)) for name, index in number.items()}

    def allocate(
        self, kept: Kept, grains: Mapping[str, Granularity], sparsity: float
    ) -> dict[str, float]:
        """A straight line over the layers."""
        number = {name: float(value) for name, value in kept()}
        last = max(number.values()) or 1.0
        return {n: sparsity + self.reach * (2 * x / last - 1) for n, x in number.items()}

    def disk_bytes(self, weights: int, itemsize: int) -> int:
        """256 MiB."""
        return 256 * MIB

    def working_bytes(self, weights: int, itemsize: int) -> int:
        """128 MiB."""
        return 128 * MIB

    def tokens(self, calibration: int, linears: int) -> int:
        """None."""
        return 0
