"""The diagonal of the empirical Fisher matrix."""

from __future__ import annotations

from secateur.calibration.statistics import GradientMean, statistics
from secateur.types import Weight


@statistics.register("fisher")
class Fisher(GradientMean):
    """F = 1/N Σ_n g_n², float32 [out, in]; g_n is the gradient of window n's loss, 0 before any.

    Example:
        >>> import torch
        >>> from secateur.calibration.statistics.fisher import Fisher
        >>> fisher = Fisher((1, 2))
        >>> fisher.update(torch.tensor([[1.0, -2.0]]))
        >>> fisher.update(torch.tensor([[3.0, 2.0]]))
        >>> fisher.value()
        tensor([[5., 4.]])
    """

    def update(self, x: Weight) -> None:
        """Add the squares of the gradient of one window, [out, in]; computed in float32."""
        gradient = x.detach().float()
        self.sum.addcmul_(gradient, gradient)
        self.total[-1] += 1
