"""Random matrices for the tests of the kernels, and the tiers to test."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from oracles.kernels import by_groups
from secateur.errors import KernelError
from secateur.quantization.groups import GroupGrid, Scales
from secateur.runtime.formats.bits import pack_bits
from secateur.runtime.kernels import library as lib
from secateur.runtime.kernels.matrix import KernelMatrix

TIERS = ("amx", "avx512bf16", "avx512", "avx2")


@contextmanager
def using(tier: str) -> Iterator[None]:
    """A tier for a while; skips the test where the processor does not have it."""
    best = lib.kernel_info().tier
    try:
        lib.use_tier(tier)
    except KernelError:
        pytest.skip(f"this processor has no {tier}")
    try:
        yield
    finally:
        lib.use_tier(best)


def example(
    rows: int, columns: int, values: torch.dtype, sparsity: float | None, seed: int = 0
) -> tuple[KernelMatrix, Tensor]:
    """A matrix, and the same dense in float64."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator)
    scale = None
    if values == torch.int8:
        scale = torch.rand(rows, generator=generator) + 0.5
        stored = torch.randint(-127, 128, (rows, columns), generator=generator).to(values)
        dense = stored.double() * scale.double()[:, None]
    else:
        stored = weight.to(values)
        dense = stored.double()
    if sparsity is None:
        return KernelMatrix(stored, scale=scale), dense
    mask = torch.rand(rows, columns, generator=generator) >= sparsity
    mask[0] = False  # a row without values
    matrix = KernelMatrix(stored[mask], bitmask=pack_bits(mask), scale=scale, columns=columns)
    return matrix, dense * mask


def example_of_codes(
    rows: int, columns: int, group: int, sparsity: float | str | None, seed: int = 0
) -> tuple[KernelMatrix, Tensor]:
    """A matrix of 4 bits, and the same dense in float64; "2:4" keeps up to two of each four."""
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(-8, 8, (rows, columns), generator=generator).to(torch.int8)
    groups = GroupGrid(4, group).groups(columns)
    code = torch.randint(0, 256, (rows, groups), generator=generator).to(torch.uint8)
    exponent = torch.randint(-60, 20, (rows,), generator=generator).to(torch.int8)
    dense = by_groups(codes, exponent, code, group)
    if sparsity is None:
        return KernelMatrix.of_codes(codes, Scales(exponent, code), group), dense
    if sparsity == "2:4":
        fours = torch.rand(rows, -(-columns // 4), 4, generator=generator)
        kept = (fours.argsort(-1) < 2).view(rows, -1)[:, :columns]
        kept[-1, ::3] = False  # fewer than two
    else:
        kept = torch.rand(rows, columns, generator=generator) >= sparsity
        kept[0] = False  # a row without values
    return KernelMatrix.of_codes(codes, Scales(exponent, code), group, kept), dense * kept
