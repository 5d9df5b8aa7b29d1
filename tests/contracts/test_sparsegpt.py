"""The solver `obs` against Algorithm 1 of the SparseGPT paper, column by column in float64."""

from __future__ import annotations

import pytest
import torch

from contracts.pattern_examples import ALL, fitting_shape, parsed, sparsities
from oracles.sparsegpt import relative_error, sparsegpt
from secateur.errors import RecipeError
from secateur.quantization.int8 import dequantize_rows, quantize_rows
from secateur.sparsity.patterns import parse_pattern
from secateur.sparsity.solvers.obs import OBS


def check_equal(case, text, scope, sparsity, block_columns=128, damping=0.01, mask=None, bits=0):
    solver, pattern = OBS(damping, block_columns, bits), parsed(text, scope)
    solution = solver.solve(
        case.weight, solver.prepare(case.statistics), pattern, sparsity, mask=mask
    )
    weight, kept, clearance = sparsegpt(
        case.weight,
        case.statistics["gram"],
        text,
        scope,
        sparsity,
        damping=damping,
        block_columns=block_columns,
        mask=mask,
        bits=bits,
    )
    assert torch.equal(solution.mask, kept)
    clear = clearance > 1e-4
    assert clear.float().mean() > 0.8
    torch.testing.assert_close(solution.weight[clear], weight.float()[clear], rtol=1e-4, atol=1e-4)


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


@pytest.mark.parametrize(("text", "scope"), ALL)
def test_rounding_in_the_same_sweep(text, scope, example):
    case = example(fitting_shape(text), seed=3, dead=2)
    for sparsity in sparsities(parsed(text, scope)):
        check_equal(case, text, scope, sparsity, bits=8)
        check_equal(case, text, scope, sparsity, block_columns=16, bits=8)


def rounded(case, mask):
    solver = OBS(bits=8)
    pattern = parse_pattern("unstructured", "layer")
    return solver.solve(case.weight, solver.prepare(case.statistics), pattern, 0.5, mask=mask)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_grid_can_be_read_off_the_weights_in_any_dtype(dtype, example):
    case = example((64, 96), seed=7, dead=3)
    mask = case.statistics["stored"] != 0
    mask[5] = False
    solution = rounded(case, mask)
    assert not solution.weight[~mask].any()
    integers, scale = quantize_rows(solution.weight)
    torch.testing.assert_close(
        dequantize_rows(integers, scale), solution.weight, rtol=3e-7, atol=0.0
    )
    again, same = quantize_rows(solution.weight.to(dtype))
    assert torch.equal(again, integers)
    torch.testing.assert_close(same, scale, rtol=3e-7, atol=0.0)


def test_rounding_with_the_inputs_in_mind_loses_less(example):
    case = example((48, 96), seed=8)
    held = case.statistics["stored"]
    mask = held != 0
    pruned = type(case)(held, case.inputs, case.statistics)
    solution = rounded(pruned, mask)
    nearest = dequantize_rows(*quantize_rows(held))
    error = relative_error(held, solution.weight, case.inputs)
    assert error == pytest.approx(solution.error, rel=1e-3)
    assert error < 0.75 * relative_error(held, nearest, case.inputs)


def test_unknown_bits(example):
    with pytest.raises(RecipeError, match="bits is 5"):
        OBS(bits=5)
    assert OBS(bits=8).rounds
    assert not OBS().rounds
