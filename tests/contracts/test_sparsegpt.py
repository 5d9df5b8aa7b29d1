"""The solver `obs` against Algorithm 1 of the SparseGPT paper, column by column in float64."""

from __future__ import annotations

import pytest
import torch

from contracts.pattern_examples import ALL, fitting_shape, parsed, sparsities
from oracles.sparsegpt import sparsegpt
from secateur.sparsity.solvers.obs import OBS


def check_equal(case, text, scope, sparsity, block_columns=128, damping=0.01, mask=None):
    solver, pattern = OBS(damping, block_columns), parsed(text, scope)
    solution = solver.solve(
        case.weight, solver.prepare(case.statistics), pattern, sparsity, mask=mask
    )
    weight, kept = sparsegpt(
        case.weight,
        case.statistics["gram"],
        text,
        scope,
        sparsity,
        damping=damping,
        block_columns=block_columns,
        mask=mask,
    )
    assert torch.equal(solution.mask, kept)
    torch.testing.assert_close(solution.weight, weight.float(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("text", "scope"), ALL)
@pytest.mark.parametrize("kind", ["plain", "tied", "dead", "bfloat16"])
def test_every_pattern(text, scope, kind, example):
    case = example(
        fitting_shape(text),
        seed=3,
        tied=kind == "tied",
        dead=5 if kind == "dead" else 0,
        dtype=torch.bfloat16 if kind == "bfloat16" else torch.float32,
    )
    for sparsity in sparsities(parsed(text, scope)):
        check_equal(case, text, scope, sparsity)
        check_equal(case, text, scope, sparsity, block_columns=16)


@pytest.mark.parametrize("scope", ["row", "layer"])
@pytest.mark.parametrize("block_columns", [1, 5, 16, 36, 1000])
def test_any_lazy_block(scope, block_columns, example):
    case = example((7, 36), seed=1, dead=2)
    for sparsity in (0.3, 0.5, 0.9):
        check_equal(case, "unstructured", scope, sparsity, block_columns)


def test_more_columns_than_a_step_and_a_block(example):
    case = example((5, 150), seed=2)
    check_equal(case, "unstructured", "layer", 0.5)
    check_equal(case, "unstructured", "row", 0.6, damping=0.1)


@pytest.mark.parametrize("text", ["2:4", "1:4", "4:8", "8:16"])
def test_groups_across_many_blocks(text, example):
    check_equal(example((6, 144), seed=5), text, None, parsed(text, None).sparsity, 48)


def test_held_mask(example):
    case = example((7, 40), seed=4, dead=3)
    mask = torch.rand(7, 40, generator=torch.Generator().manual_seed(0)) > 0.6
    check_equal(case, "unstructured", "layer", 0.6, 16, mask=mask)


def test_wholly_pruned_blocks_of_columns(example):
    # In the row scope a lazy block of one column is either kept or pruned as a whole.
    check_equal(example((4, 9)), "unstructured", "row", 0.5, block_columns=1)
