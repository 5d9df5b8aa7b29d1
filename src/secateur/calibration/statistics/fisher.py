"""The diagonal of the empirical Fisher matrix."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch

from secateur.calibration.statistics import statistics
from secateur.types import Weight


@statistics.register("fisher")
class Fisher:
    """F = 1/N Σ_n g_n², float32 [out, in]; g_n is the gradient of window n's loss, 0 before any.

    Args:
        shape: (out, in) of the weight.
        device: where the sums are kept and computed.

    Example:
        >>> import torch
        >>> from secateur.calibration.statistics.fisher import Fisher
        >>> fisher = Fisher((1, 2))
        >>> fisher.update(torch.tensor([[1.0, -2.0]]))
        >>> fisher.update(torch.tensor([[3.0, 2.0]]))
        >>> fisher.value()
        tensor([[5., 4.]])
    """

    reads: ClassVar[Literal["inputs", "gradients"]] = "gradients"

    def __init__(self, shape: tuple[int, int], device: torch.device | str = "cpu") -> None:
        # the last number counts the windows, so that all-reducing `total` merges both
        self.total = torch.zeros(shape[0] * shape[1] + 1, device=device)
        self.sum = self.total[:-1].view(shape)

    def update(self, x: Weight) -> None:
        """Add the squares of the gradient of one window, [out, in]; computed in float32."""
        gradient = x.detach().float()
        self.sum.addcmul_(gradient, gradient)
        self.total[-1] += 1

    def merge(self, other: Fisher) -> None:
        """Add what `other` has seen."""
        self.total += other.total.to(self.total.device)

    def value(self) -> Weight:
        """F, float32 [out, in]."""
        return self.sum / max(int(self.total[-1]), 1)

    @staticmethod
    def nbytes(shape: tuple[int, int]) -> int:
        """Four bytes for each weight."""
        return 4 * shape[0] * shape[1]
