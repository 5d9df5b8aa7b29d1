"""Zeroing with and without a grid, and zeros of a rounded model that its mask keeps."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from secateur.errors import RecipeError
from secateur.sparsity.patterns import parse_pattern
from secateur.sparsity.scores import scores
from secateur.sparsity.solvers.obs import OBS
from secateur.sparsity.solvers.zeroing import Zeroing

PATTERN = parse_pattern("unstructured")


def solved(weight: Tensor, mask: Tensor, **grid: int) -> Tensor:
    solver = Zeroing(**grid)
    return solver.solve(weight, solver.prepare({}), mask).weight


def nearest_error(row: list[float], bits: int) -> float:
    """The least squared error of one group with any scale of 5 significant bits, one by one."""
    lowest, largest = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    least = math.inf
    for octave in range(-8, 3):
        for step in range(16):
            for sign in (1, -1):
                s = sign * 2.0**octave * (1 + step / 16)
                rounded = (s * min(max(round(x / s), lowest), largest) for x in row)
                least = min(least, sum((x - y) ** 2 for x, y in zip(row, rounded, strict=True)))
    return least


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_kept_weights_become_the_nearest_of_their_grid(bits: int) -> None:
    generator = torch.Generator().manual_seed(bits)
    weight = torch.randn(6, 32, generator=generator)
    mask = torch.rand(6, 32, generator=generator) < 0.6
    found = solved(weight, mask, bits=bits, group=32)
    assert not found[~mask].any()
    for own, row, kept in zip(weight, found, mask, strict=True):
        lost = float(((row - own)[kept]).square().sum())
        assert lost <= 1.05 * nearest_error((own * kept).tolist(), bits) + 1e-6


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_what_a_solver_has_rounded_stays_bit_for_bit(bits: int) -> None:
    generator = torch.Generator().manual_seed(bits)
    weight, x = torch.randn(16, 64, generator=generator), torch.randn(128, 64, generator=generator)
    mask = torch.rand(16, 64, generator=generator) < 0.5
    solver = OBS(bits=bits)
    rounded = solver.solve(weight, solver.prepare({"gram": x.t() @ x}), mask)
    stored = rounded.weight.bfloat16()
    again = solved(stored, mask, bits=bits).bfloat16()
    assert torch.equal(again.view(torch.int16), stored.view(torch.int16))
    if bits < 4:
        assert ((stored == 0) & mask).any()  # some kept weights are 0


def test_kept_weights_that_are_zero_outrank_pruned_ones() -> None:
    weight = torch.tensor([[0.0, -0.0, 2.0, 0.0, -0.0, -1.0]])
    score = scores["kept"]()(weight, {"stored": weight})
    assert score.tolist() == [[0.0, 0.5, 1.0, 0.0, 0.5, 1.0]]
    kept = PATTERN.mask(score, 2 / 6)
    assert kept.tolist() == [[False, True, True, False, True, True]]
    assert PATTERN.mask(score, 4 / 6).tolist() == [[False, False, True, False, False, True]]


def test_unknown_grids_are_refused() -> None:
    with pytest.raises(RecipeError, match="bits is 5"):
        Zeroing(bits=5)
    with pytest.raises(RecipeError, match="group is 48"):
        Zeroing(bits=4, group=48)
