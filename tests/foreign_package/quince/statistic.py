"""The largest magnitude of each input."""

from typing import ClassVar

import torch
from torch import Tensor

from secateur.calibration.statistics import InputSource, StatisticSource, statistics


@statistics.register("quince-peak")
class Peak:
    """max_t |x_tj|, float32 [in]; 0 before any token."""

    source: ClassVar[StatisticSource] = InputSource()

    def __init__(self, shape: tuple[int, int], device: torch.device | str = "cpu") -> None:
        self.total = torch.zeros(shape[1], device=device)

    def update(self, x: Tensor) -> None:
        """Take in the inputs of more tokens, [tokens, in]."""
        self.total = torch.maximum(self.total, x.detach().float().abs().amax(0))

    def merge(self, other: "Peak") -> None:
        """Take in all that `other` has seen."""
        self.total = torch.maximum(self.total, other.total.to(self.total.device))

    def value(self) -> Tensor:
        """The peaks, float32 [in]."""
        return self.total

    @staticmethod
    def nbytes(shape: tuple[int, int]) -> int:
        """Four bytes for each input."""
        return 4 * shape[1]
