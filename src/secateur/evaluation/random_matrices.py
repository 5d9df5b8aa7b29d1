"""Random matrices in the form of the kernels, for timing. Speed does not depend on the numbers."""

from __future__ import annotations

import copy
import functools

import torch
from torch import Tensor

from secateur.quantization.groups import Scales
from secateur.runtime.formats.bits import pack_bits
from secateur.runtime.kernels.matrix import KernelMatrix

GROUP = 64
"""Weights that share a scale in int4."""

DIFFERENT_ROWS = 256
"""The zeros of so many rows are drawn; then they repeat."""

EXPONENT = -20
"""Of the scales of int4. It keeps sums of products small."""

FLOATS = {"bf16": torch.bfloat16, "float32": torch.float32}


def random_matrix(
    rows: int, columns: int, values: str, sparsity: float = 0.0, group: int = GROUP
) -> KernelMatrix:
    """A random matrix: dense, or with the same number of zeros in each row.

    Args:
        rows: out.
        columns: in.
        values: bf16, float32, int8 or int4.
        sparsity: the fraction of zeros; 0 for a dense matrix without a mask.
        group: weights that share a scale, for int4.
    """
    kept = columns - round(sparsity * columns)
    mask = random_mask(rows, columns, kept) if sparsity else None
    if values == "int4":
        codes = torch.randint(-7, 8, (rows, columns), dtype=torch.int8)
        code = torch.randint(0, 256, (rows, -(-columns // group)), dtype=torch.uint8)
        exponent = torch.full((rows,), EXPONENT, dtype=torch.int8)
        return KernelMatrix.of_codes(codes, Scales(exponent, code), group, mask)
    scale = torch.rand(rows) * 2.0**EXPONENT if values == "int8" else None
    if mask is None:
        return KernelMatrix(numbers(rows * columns, values).view(rows, columns), scale=scale)
    return KernelMatrix(
        numbers(rows * kept, values), bitmask=pack_bits(mask), columns=columns, scale=scale
    )


@functools.cache
def random_mask(rows: int, columns: int, kept: int) -> Tensor:
    """With the same number of ones in each row; the masks of some rows repeat."""
    some = torch.rand(min(rows, DIFFERENT_ROWS), columns).argsort(1) < kept
    return some.repeat(-(-rows // len(some)), 1)[:rows]


def numbers(count: int, values: str) -> Tensor:
    """Random values."""
    if values == "int8":
        return torch.randint(-127, 128, (count,), dtype=torch.int8)
    return torch.randn(count).mul_(0.02).to(FLOATS[values])


def another(matrix: KernelMatrix) -> KernelMatrix:
    """The same numbers in memory of their own."""
    found = copy.copy(matrix)
    found.values = matrix.values.clone()
    found.mask = None if matrix.mask is None else matrix.mask.clone()
    found.describe(matrix.c.type)
    return found
