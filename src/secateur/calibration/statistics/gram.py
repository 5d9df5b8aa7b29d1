"""The second moments of the inputs: all that a layer-wise squared error depends on."""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar

import torch
from jaxtyping import Float, Float32
from torch import Tensor

from secateur.calibration.statistics import (
    InputSource,
    Stacked,
    StatisticSource,
    check_finite,
    statistics,
)
from secateur.machine import exact_in_tf32

# Rows of a panel. 512 is 1.2 to 1.9 times as fast as whole matrices for 1024 to 3072 inputs; for
# fewer inputs, 256 costs no time and saves memory.
_WIDE_FROM = 1024
_WIDE, _NARROW = 512, 256


@statistics.register("gram")
class Gram(Stacked):
    """G = XᵀX = Σ_t x_t x_tᵀ, float32 [in, in].

    The inputs of one update are multiplied and summed in float32, the products of updates in
    float64. A float64 holds the sum of float32 products to the last digit unless they differ by
    more than 2²⁹ / updates in size. So the order of the updates, and how many processes have made
    them, does not change the value.

    Only the upper triangle is summed, in panels of some rows from their first diagonal entry to the
    right. It is half of the matrix in twice the bytes of a number.

    Args:
        shape: (out, in) of the weight.
        device: where the sums are kept and computed.
        *linears: the number of linears, if there are several.

    Attributes:
        total: the panels, one after the other, float64.

    Example:
        >>> import torch
        >>> from secateur.calibration.statistics.gram import Gram
        >>> gram = Gram((1, 2))
        >>> gram.update(torch.tensor([[1.0, 2.0], [3.0, 0.0]]))
        >>> gram.value()
        tensor([[10.,  2.],
                [ 2.,  4.]])
    """

    source: ClassVar[StatisticSource] = InputSource()

    def __init__(
        self, shape: tuple[int, int], device: torch.device | str = "cpu", *linears: int
    ) -> None:
        self.size = shape[1]
        numbers = self.nbytes(shape) // 8
        self.total = torch.zeros(*linears, numbers, dtype=torch.float64, device=device)
        self.whole: Tensor | None = None

    def update(self, x: Float[Tensor, "*linears tokens in"]) -> None:
        """Add the inputs of more tokens, [tokens, in]."""
        inputs = x.detach().float()
        with exact_in_tf32(x):
            for rows, panel in self._panels():
                # float32 product, float64 sum
                panel += inputs[..., rows].mT @ inputs[..., rows.start :]

    def value(self) -> Float32[Tensor, "*linears in in"]:
        """XᵀX, float32 [in, in], exactly symmetric. It takes the place of the sums.

        Raises:
            NumericalError: an input was infinite or NaN.
        """
        if self.whole is None:
            size = (*self.total.shape[:-1], self.size, self.size)
            whole = torch.empty(size, device=self.total.device)
            for rows, panel in self._panels():
                whole[..., rows, rows.start :] = panel
            check_finite(
                whole.diagonal(dim1=-2, dim2=-1)
            )  # |G_ij|² ≤ G_ii G_jj: it bounds all other entries
            for rows, _ in self._panels():
                # A diagonal block is not symmetric to the last bit: its upper half counts.
                square = whole[..., rows, rows]
                square.copy_(square.triu() + square.triu(1).mT)
                whole[..., rows.stop :, rows] = whole[..., rows, rows.stop :].mT
            self.whole, self.total = whole, self.total.new_empty(0)
        return self.whole

    @staticmethod
    def nbytes(shape: tuple[int, int]) -> int:
        """Float64 panels of the upper triangle: a little more than float32 [in, in]."""
        size = shape[1]
        return 8 * sum((rows.stop - rows.start) * (size - rows.start) for rows in _rows(size))

    def _panels(self) -> Iterator[tuple[slice, Tensor]]:
        """The rows of each panel, and its view of the sums, [..., rows, in - first row]."""
        begin = 0
        for rows in _rows(self.size):
            height, width = rows.stop - rows.start, self.size - rows.start
            panel = self.total[..., begin : begin + height * width]
            yield rows, panel.unflatten(-1, (height, width))
            begin += height * width


def _rows(size: int) -> Iterator[slice]:
    """Rows that are multiplied at once, each from its own diagonal block to the right."""
    height = _WIDE if size >= _WIDE_FROM else _NARROW
    for start in range(0, size, height):
        yield slice(start, min(start + height, size))
