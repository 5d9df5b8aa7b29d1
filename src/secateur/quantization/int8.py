"""Weights as 8-bit integers: symmetric, one scale for every output row.

    scale_i = max_j |w_ij| / 127        (1 for a row of zeros)
    q_ij    = round(w_ij / scale_i)     (half to even, −127 … 127)
    w_ij   ≈ scale_i · q_ij

There is no zero point, so a zero is the integer 0 and nothing else: pruned weights stay exactly
zero. A weight that is not zero can round to 0 where it is below half a step.
"""

from __future__ import annotations

import torch
from torch import Tensor

from secateur.errors import NumericalError
from secateur.types import Weight

__all__ = ["LARGEST", "dequantize_rows", "quantize_rows"]

LARGEST = 127
"""The largest magnitude; −128 is never used, so that the grid is symmetric."""

SMALLEST_SCALE = torch.finfo(torch.float32).tiny
"""Below it a scale would lose bits, or be flushed to zero by the processor."""


def quantize_rows(weight: Weight) -> tuple[Tensor, Tensor]:
    """Round a matrix to 8-bit integers.

    Args:
        weight: [out, in], any floating dtype.

    Returns:
        The integers, int8 [out, in], and the scales, float32 [out].

    Raises:
        NumericalError: a weight is NaN or infinite, and so has no place on the grid.
    """
    values = weight.float()
    peak = values.abs().amax(dim=1) if values.shape[1] else values.new_zeros(values.shape[0])
    if not torch.isfinite(peak).all():
        odd = int((~torch.isfinite(values)).sum())
        raise NumericalError(
            f"{odd} of {values.numel()} weights are NaN or infinite and cannot be int8",
            remedy="store this model with floating-point values, or find where they come from",
        )
    scale = torch.where(peak > 0, (peak / LARGEST).clamp_min(SMALLEST_SCALE), 1.0)
    rounded = (values / scale[:, None]).round_().clamp_(-LARGEST, LARGEST)
    return rounded.to(torch.int8), scale


def dequantize_rows(quantized: Tensor, scale: Tensor) -> Tensor:
    """The weights an int8 matrix stands for, float32 [out, in].

    Args:
        quantized: int8 [out, in].
        scale: float32 [out].
    """
    return quantized.float().mul_(scale[:, None])
