"""The mean of each input feature over all calibration tokens."""

from __future__ import annotations

import torch
from jaxtyping import Float32
from torch import Tensor

from secateur.calibration.statistics import ColumnSums, check_finite, statistics
from secateur.types import Inputs


@statistics.register("column_mean")
class ColumnMean(ColumnSums):
    """μ_j = 1/N Σ_t x_tj, float32 [in]; 0 before any token. Summed in float64.

    Example:
        >>> import torch
        >>> from secateur.calibration.statistics.column_mean import ColumnMean
        >>> mean = ColumnMean((1, 2))
        >>> mean.update(torch.tensor([[3.0, 1.0], [4.0, 0.0]]))
        >>> mean.value()
        tensor([3.5000, 0.5000])
    """

    sums = 2

    def update(self, x: Inputs) -> None:
        """Add the inputs of more tokens, [tokens, in]: their number and their sum."""
        inputs = x.detach()
        self.total[0] += len(inputs)
        self.total[1] += inputs.sum(0, dtype=torch.float64)

    def value(self) -> Float32[Tensor, " in"]:
        """μ_j of every input feature, float32 [in].

        Raises:
            NumericalError: an input was infinite or NaN.
        """
        check_finite(self.total[1])
        return (self.total[1] / self.total[0].clamp(min=1)).float()
