"""Rounding to the types of ggml: the sweep and the descent."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch

from oracles.scores import damped_hessian
from secateur.quantization.block_types import TYPES
from secateur.quantization.blocks import BlockGrid, Blocks
from secateur.quantization.sweep_grids import BlockColumns, descend
from secateur.sparsity.column_sweep import sweep
from secateur.sparsity.hessian import inverse_factor

SOME = pytest.mark.parametrize("kind", ["q2_k", "q3_k", "q5_k", "q6_k", "iq4_xs", "q4_1", "q8_0"])


def problem(rows, columns, seed=0):
    """A weight [out, in] and a gram whose columns are alike."""
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(4 * columns, columns, generator=generator)
    inputs += inputs.roll(1, dims=1) + 2 * inputs[:, :1]
    weight = torch.randn(rows, columns, generator=generator) * 0.02
    return weight, inputs.t() @ inputs


def rounded(kind, weight, gram, passes, mask=None):
    """The weight after the sweep and so many passes, transposed, and its grid."""
    factor, _ = inverse_factor(gram, 0.01)
    hessian = damped_hessian(gram)[0].float()
    columns = weight.mT.contiguous()
    kept = torch.ones_like(columns, dtype=torch.bool) if mask is None else mask.mT.contiguous()
    columns *= kept
    grid = BlockColumns(BlockGrid(kind), columns)
    sweep(columns, kept, factor, grid=grid)
    diagonal = hessian.diagonal(dim1=-2, dim2=-1)
    descend(columns, grid, weight.mT.contiguous(), kept, gram, diagonal, passes)
    return columns, grid


def errors(columns, weight, gram):
    """(x − w) H (x − w)ᵀ of each row, float64."""
    wrong = (columns.mT - weight).double()
    return ((wrong @ damped_hessian(gram)[0].double()) * wrong).sum(-1)


@SOME
def test_no_pass_raises_the_error_of_a_row_and_all_lower_it(kind):
    weight, gram = problem(24, 512)
    nearest = BlockGrid(kind).quantize(weight, gram.diagonal()).values.mT
    found = [errors(nearest, weight, gram)]
    for passes in (0, 1, 3):
        columns, grid = rounded(kind, weight, gram, passes)
        blocks = grid.blocks(columns)
        assert torch.equal(blocks.values.mT, columns)
        assert torch.equal(Blocks.decode(kind, blocks.encode()).values.mT, columns)
        found.append(errors(columns, weight, gram))
    _, swept, once, thrice = found
    assert (once <= swept * (1 + 1e-4)).all()
    assert (thrice <= once * (1 + 1e-4)).all()
    sums = [float(each.sum()) for each in found]
    assert sums == sorted(sums, reverse=True)
    assert sums[-1] < 0.9 * sums[0]


@SOME
def test_no_other_code_or_integer_is_better_after_the_descent(kind):
    weight, gram = problem(2, BlockGrid(kind).block, 1)
    columns, grid = rounded(kind, weight, gram, 12)
    blocks, least = grid.blocks(columns), errors(columns, weight, gram)
    table = blocks.grid.table

    def better(name, lowest, highest, step):
        held = getattr(blocks, name)
        for index, shift in itertools.product(range(0, held.shape[1], step), (-1, 1)):
            moved = held.clone()
            moved[:, index] = (moved[:, index].int() + shift).clamp(lowest, highest)
            other = replace(blocks, **{name: moved}).values.mT
            assert (errors(other, weight, gram) > least * (1 - 1e-4)).all(), (name, index)

    better("codes", table.lowest + table.unused, table.highest, 5)
    if table.has_integers:
        better("scales", *table.scales, 1)
        better("minima", *table.minima, 1)


@pytest.mark.parametrize("kind", [kind for kind in TYPES if BlockGrid(kind).exact_zero])
def test_zeros_of_a_mask_stay(kind):
    weight, gram = problem(16, 256, 2)
    mask = torch.rand(weight.shape, generator=torch.Generator().manual_seed(3)) < 0.6
    columns, grid = rounded(kind, weight, gram, 2, mask)
    assert not columns[~mask.mT].any()
    assert torch.equal(grid.blocks(columns).values.mT, columns)


@pytest.mark.parametrize("kind", ["q2_k", "iq4_xs", "q5_0"])
def test_a_batch_is_rounded_as_each_alone(kind):
    pairs = [problem(8, 256, seed) for seed in (4, 5)]
    weight, gram = (torch.stack(each) for each in zip(*pairs, strict=True))
    factor = torch.stack([inverse_factor(each, 0.01)[0] for each in gram])
    diagonal = torch.stack([damped_hessian(each)[0].float().diagonal() for each in gram])
    columns = weight.mT.contiguous()
    kept, grid = torch.ones_like(columns, dtype=torch.bool), BlockColumns(BlockGrid(kind), columns)
    sweep(columns, kept, factor, grid=grid)
    descend(columns, grid, weight.mT.contiguous(), kept, gram, diagonal, 2)
    blocks = grid.blocks(columns)
    assert blocks.shape == weight.shape
    for number, pair in enumerate(pairs):
        alone, _ = rounded(kind, *pair, 2)
        torch.testing.assert_close(columns[number], alone, rtol=1e-4, atol=1e-6)
