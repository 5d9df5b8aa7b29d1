"""The variance of each input feature over all calibration tokens."""

from __future__ import annotations

from jaxtyping import Float32
from torch import Tensor

from secateur.calibration.statistics import ColumnSums, check_finite, statistics
from secateur.types import Inputs


@statistics.register("column_variance")
class ColumnVariance(ColumnSums):
    """σ²_j = 1/N Σ_t x_tj² − (1/N Σ_t x_tj)², float32 [in]; 0 before any token.

    Counts and sums are float64, so that subtracting the mean's square loses no digit that float32
    inputs have, and that two gathered elsewhere add up.

    Example:
        >>> import torch
        >>> from secateur.calibration.statistics.column_variance import ColumnVariance
        >>> variance = ColumnVariance((1, 2))
        >>> variance.update(torch.tensor([[3.0, 1.0], [5.0, 1.0]]))
        >>> variance.value()
        tensor([1., 0.])
    """

    sums = 3

    def update(self, x: Inputs) -> None:
        """Add the inputs of more tokens, [tokens, in]: number, sum, sum of squares."""
        inputs = x.detach().double()
        self.total[0] += len(inputs)
        self.total[1] += inputs.sum(0)
        self.total[2] += inputs.square().sum(0)

    def value(self) -> Float32[Tensor, " in"]:
        """σ²_j of every input feature, float32 [in].

        Raises:
            NumericalError: an input was infinite or NaN.
        """
        check_finite(self.total[2])
        tokens = self.total[0].clamp(min=1)
        mean = self.total[1] / tokens
        return (self.total[2] / tokens - mean.square()).clamp(min=0).float()
