"""Products as the formulas say, weight by weight or in float64."""

from __future__ import annotations

import torch
from torch import Tensor

BLOCK = 256


def bitmask_product(x: Tensor, dense: Tensor) -> Tensor:
    """x · Wᵀ in float64."""
    return x.double() @ dense.double().T


def rounded_to_bytes(x: Tensor) -> Tensor:
    """x in int8 with one scale, largest / 127, for each 256 of a row; as numbers in float64."""
    rounded = torch.zeros_like(x, dtype=torch.float64)
    for row in range(len(x)):
        for start in range(0, x.shape[1], BLOCK):
            block = x[row, start : start + BLOCK]
            largest = block.abs().max()
            if largest == 0:
                continue
            inverse = torch.tensor(127.0) / largest  # in float32, as the kernels compute it
            scale = (largest / 127.0).double()
            rounded[row, start : start + BLOCK] = (block * inverse).round().double() * scale
    return rounded
