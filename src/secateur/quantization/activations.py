"""Activations as 8-bit integers: symmetric, one scale for each 64 consecutive ones of a token.

    scale_b = max_j |x_j| / 127                 over the columns j of block b
    q_j     = round(x_j · (127 / max_j |x_j|))  half to even; 0 for a block of zeros
    x_j    ≈ scale_b · q_j

Matrices of int8, int4 and int3 meet activations that are rounded like this, in every kernel and
without kernels. Fewer for each scale lose less and cost more: with 256 SmolLM2 lost twice as much.
All numbers are float32.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

GROUP = 64
"""How many consecutive activations share a scale. The last block of a token can be shorter."""

LARGEST = 127.0


def integers_of(x: Tensor) -> tuple[Tensor, Tensor]:
    """Activations as integers with scales.

    Args:
        x: activations [..., in], any floating dtype.

    Returns:
        q as float32 [..., blocks · 64], zeros past the columns; and scales, float32 [..., blocks].
    """
    blocks = functional.pad(x.float(), (0, -x.shape[-1] % GROUP)).unflatten(-1, (-1, GROUP))
    most = blocks.abs().amax(-1, keepdim=True)
    largest = torch.full_like(most, LARGEST)  # torch would multiply a number by 1 / most
    inverse = torch.where(most > 0, largest / most, 0.0)
    return (blocks * inverse).round_().flatten(-2), (most / largest).squeeze(-1)


def round_activations(x: Tensor) -> Tensor:
    """What kernels multiply instead of x.

    Args:
        x: activations [..., in], any floating dtype.

    Returns:
        The rounded activations, scale · q, float32 [..., in].

    Example:
        >>> import torch
        >>> from secateur.quantization.activations import round_activations
        >>> round_activations(torch.tensor([[127.0, -1.4, 0.6]]))
        tensor([[127.,  -1.,   1.]])
    """
    integers, scales = integers_of(x)
    rounded = integers.unflatten(-1, (-1, GROUP)) * scales[..., None]
    return rounded.flatten(-2)[..., : x.shape[-1]]
