"""The gradient of the mean calibration loss."""

from __future__ import annotations

from secateur.calibration.statistics import GradientMean, statistics
from secateur.types import Weight


@statistics.register("gradient")
class Gradient(GradientMean):
    """ḡ = 1/N Σ_n g_n, float32 [out, in]; g_n is the gradient of window n's loss, 0 before any.

    Example:
        >>> import torch
        >>> from secateur.calibration.statistics.gradient import Gradient
        >>> gradient = Gradient((1, 2))
        >>> gradient.update(torch.tensor([[1.0, -2.0]]))
        >>> gradient.update(torch.tensor([[3.0, 2.0]]))
        >>> gradient.value()
        tensor([[2., 0.]])
    """

    def update(self, x: Weight) -> None:
        """Add the gradient of one window, [out, in]; summed in float32."""
        self.sum += x.detach()
        self.total[-1] += 1
