"""The norm of each input feature over all calibration tokens."""

from __future__ import annotations

from typing import ClassVar

import torch

from secateur.calibration.statistics import InputSource, Source, check_finite, statistics
from secateur.types import ColumnNorm as Norms
from secateur.types import Inputs

# On the CPU, tokens are squared in chunks of about this many numbers: small enough to stay in a
# core's cache and to be allocated without new pages from the system. 0.4 ns a number, where one
# pass over [2048, 1536] takes 2 ns and vector_norm over the first axis 4 ns.
_CHUNK = 2**15


@statistics.register("column_norm")
class ColumnNorm:
    """‖X_j‖₂ = sqrt(Σ_t x_tj²), float32 [in].

    Tokens are squared and summed in float32, a chunk at a time, and the sums of chunks in float64.
    So the order of the chunks, and how many processes have gathered them, does not change it.

    If the gram is gathered anyway, this is the square root of its diagonal.

    Args:
        shape: (out, in) of the weight.
        device: where the sums are kept and computed.

    Example:
        >>> import torch
        >>> from secateur.calibration.statistics.column_norm import ColumnNorm
        >>> norm = ColumnNorm((1, 2))
        >>> norm.update(torch.tensor([[3.0, 1.0]]))
        >>> norm.update(torch.tensor([[4.0, 0.0]]))
        >>> norm.value()
        tensor([5., 1.])
    """

    source: ClassVar[Source] = InputSource()

    def __init__(self, shape: tuple[int, int], device: torch.device | str = "cpu") -> None:
        self.total = torch.zeros(shape[1], dtype=torch.float64, device=device)

    def update(self, x: Inputs) -> None:
        """Add the inputs of more tokens, [tokens, in]."""
        tokens = max(1, _CHUNK // x.shape[1]) if x.device.type == "cpu" else max(1, len(x))
        for chunk in x.detach().split(tokens):
            inputs = chunk.float()
            self.total += (inputs * inputs).sum(0)

    def merge(self, other: ColumnNorm) -> None:
        """Add what `other` has seen."""
        self.total += other.total.to(self.total.device)

    def value(self) -> Norms:
        """‖X_j‖₂ of every input feature, float32 [in].

        Raises:
            NumericalError: an input was infinite or NaN.
        """
        check_finite(self.total)
        return self.total.sqrt().float()

    @staticmethod
    def nbytes(shape: tuple[int, int]) -> int:
        """A sum of squares, float64."""
        return 8 * shape[1]
