"""Products as the formulas say, weight by weight or in float64."""

from __future__ import annotations

import torch
from torch import Tensor

GROUP = 64


def bitmask_product(x: Tensor, dense: Tensor) -> Tensor:
    """x · Wᵀ in float64."""
    return x.double() @ dense.double().T


def share_of(column: int, columns: int, shares: str) -> tuple[int, int]:
    """Which columns share a scale, by the rule of docs/format.md: those with the same answer."""
    if shares == "consecutive":
        return 0, column // GROUP
    words, first, block = -(-columns // GROUP), 0, 8
    while True:
        block = max(k for k in (8, 4, 2, 1) if k <= min(block, words - first))
        if column < (first + block) * GROUP:
            return first, (column - first * GROUP) // 4 % block
        first += block


def rounded_to_bytes(x: Tensor, shares: str) -> Tensor:
    """x in int8 with one scale, largest / 127, for each 64 columns; as numbers in float64."""
    rounded = torch.zeros_like(x, dtype=torch.float64)
    columns_of: dict[tuple[int, int], list[int]] = {}
    for column in range(x.shape[1]):
        columns_of.setdefault(share_of(column, x.shape[1], shares), []).append(column)
    for row in range(len(x)):
        for together in columns_of.values():
            block = x[row, together]
            largest = block.abs().max()
            if largest == 0:
                continue
            inverse = torch.tensor(127.0) / largest  # in float32, as the kernels compute it
            scale = (largest / 127.0).double()
            rounded[row, together] = (block * inverse).round().double() * scale
    return rounded


def by_groups(codes: Tensor, exponent: Tensor, code: Tensor, group: int) -> Tensor:
    """s · q weight by weight in float64, s = ± 2^(e + c div 16) · (1 + (c mod 16) / 16)."""
    dense = torch.zeros(codes.shape, dtype=torch.float64)
    for row, (numbers, steps) in enumerate(zip(codes.tolist(), code.tolist(), strict=True)):
        e = int(exponent[row])
        signed = [(1 - 2 * (byte // 128), byte % 128) for byte in steps]
        scales = [sign * 2.0 ** (e + c // 16) * (1 + c % 16 / 16) for sign, c in signed]
        dense[row] = torch.tensor(
            [scales[column // group] * q for column, q in enumerate(numbers)], dtype=torch.float64
        )
    return dense
