"""Products as the formulas say, weight by weight or in float64."""

from __future__ import annotations

import torch
from torch import Tensor

GROUP = 64


def bitmask_product(x: Tensor, dense: Tensor) -> Tensor:
    """x · Wᵀ in float64."""
    return x.double() @ dense.double().T


def rounded_to_bytes(x: Tensor) -> Tensor:
    """x in int8 with one scale, largest / 127, for each 64 of a row; as numbers in float64."""
    rounded = torch.zeros_like(x, dtype=torch.float64)
    for row in range(len(x)):
        for start in range(0, x.shape[1], GROUP):
            block = x[row, start : start + GROUP]
            largest = block.abs().max()
            if largest == 0:
                continue
            inverse = torch.tensor(127.0) / largest  # in float32, as the kernels compute it
            scale = (largest / 127.0).double()
            rounded[row, start : start + GROUP] = (block * inverse).round().double() * scale
    return rounded


def by_groups(codes: Tensor, exponent: Tensor, code: Tensor, group: int) -> Tensor:
    """s · q weight by weight in float64, s = 2^(e + c div 16) · (1 + (c mod 16) / 16)."""
    dense = torch.zeros(codes.shape, dtype=torch.float64)
    for row, (numbers, steps) in enumerate(zip(codes.tolist(), code.tolist(), strict=True)):
        e = int(exponent[row])
        scales = [2.0 ** (e + c // 16) * (1 + c % 16 / 16) for c in steps]
        dense[row] = torch.tensor(
            [scales[column // group] * q for column, q in enumerate(numbers)], dtype=torch.float64
        )
    return dense
