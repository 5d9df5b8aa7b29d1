"""Weights as 8-bit integers: symmetric, one scale for every output row.

    scale_i = max_j |w_ij| / 127        (1 for a row of zeros)
    q_ij    = round(w_ij / scale_i)     (half to even, −127 … 127)
    w_ij   ≈ scale_i · q_ij

There is no zero point, so a zero is exactly the integer 0, and pruned weights stay exactly zero. A
nonzero weight below half a step can also round to 0.
"""

from __future__ import annotations

import torch
from torch import Tensor

from secateur.errors import NumericalError
from secateur.types import Weight

LARGEST = 127
"""The largest magnitude; −128 is never used, so that the grid is symmetric."""

_SMALLEST_SCALE = torch.finfo(torch.float32).tiny
"""A smaller scale would lose bits, or the processor would flush it to zero."""

AT_ONCE = 2**24
"""Weights that are float32 at the same time, which bounds the memory for an embedding."""


def quantize_rows(weight: Weight) -> tuple[Tensor, Tensor]:
    """Round a matrix to 8-bit integers.

    Args:
        weight: [out, in], any floating dtype.

    Returns:
        The integers, int8 [out, in], and the scales, float32 [out].

    Raises:
        NumericalError: a weight is NaN or infinite, so the grid has no value for it.

    Example:
        >>> import torch
        >>> from secateur.quantization.int8 import quantize_rows
        >>> quantize_rows(torch.tensor([[12.7, -1.0, 0.0]]))
        (tensor([[127, -10,   0]], dtype=torch.int8), tensor([0.1000]))
    """
    out, columns = weight.shape
    quantized = torch.empty(out, columns, dtype=torch.int8, device=weight.device)
    scale = torch.empty(out, dtype=torch.float32, device=weight.device)
    rows = max(1, AT_ONCE // max(1, columns))
    for start in range(0, out, rows):
        block = slice(start, start + rows)
        values = weight[block].float()  # a block of rows at a time is float32
        scale[block] = _scales_of(values)
        rounded = (values / scale[block, None]).round_().clamp_(-LARGEST, LARGEST)
        quantized[block] = rounded.to(torch.int8)
    return quantized, scale


def not_finite(values: Tensor, integers: str) -> NumericalError:
    """The error for weights that are NaN or infinite and so are on no grid."""
    odd = int((~torch.isfinite(values)).sum())
    return NumericalError(
        f"{odd} of {values.numel()} weights are NaN or infinite and cannot be {integers}",
        remedy="store this model with floating-point values, or find their source",
    )


def _scales_of(values: Tensor) -> Tensor:
    """The scale of each row of float32 values, [rows]."""
    peak = values.abs().amax(dim=1)
    # The largest of a row is not finite if any of them is not.
    if not torch.isfinite(peak).all():
        raise not_finite(values, "int8")
    return torch.where(peak > 0, (peak / LARGEST).clamp_min(_SMALLEST_SCALE), 1.0)


def grid_rows(peak: Tensor) -> Tensor:
    """The largest magnitudes whose grids survive any dtype, float32 [out], for rows of weights.

    With 8 significant bits a largest magnitude is the same number in bfloat16, float16 and
    float32. If a row contains ±peak, its other weights k · peak / 127 may be rounded to bfloat16.
    This moves them by less than half a step, so `quantize_rows` finds the same k again.

    Args:
        peak: the largest magnitude of each row, float32 [out].

    Example:
        >>> import torch
        >>> from secateur.quantization.int8 import grid_rows
        >>> grid_rows(torch.tensor([1.001, 2.0]))
        tensor([1., 2.])
    """
    # bfloat16 has 8 significant bits. The smallest peak still has a normal scale.
    return torch.where(peak > 0, peak.bfloat16().float().clamp_min(LARGEST * _SMALLEST_SCALE), 1.0)


def nearest_rows(weight: Weight) -> Weight:
    """Round float32 weights [out, in] to int8 with the scale of `grid_rows`, and return weights.

    Example:
        >>> import torch
        >>> from secateur.quantization.int8 import nearest_rows
        >>> nearest_rows(torch.tensor([[127.0, -9.7, 0.2]]))
        tensor([[127., -10.,   0.]])
    """
    # The peak was rounded, so a weight may lie beyond it by a little: hence the clamp.
    scale = grid_rows(weight.abs().amax(dim=1))[:, None] / LARGEST
    return (weight / scale).round_().clamp_(-LARGEST, LARGEST).mul_(scale)


def dequantize_rows(quantized: Tensor, scale: Tensor) -> Tensor:
    """The weights that an int8 matrix represents, float32 [out, in].

    Args:
        quantized: int8 [out, in].
        scale: float32 [out].

    Example:
        >>> import torch
        >>> from secateur.quantization.int8 import dequantize_rows
        >>> dequantize_rows(torch.tensor([[127, -10, 0]], dtype=torch.int8), torch.tensor([0.5]))
        tensor([[63.5000, -5.0000,  0.0000]])
    """
    return quantized.float().mul_(scale[:, None])
