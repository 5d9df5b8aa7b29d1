"""The solver `obs` against Algorithm 1 of the SparseGPT paper, column by column in float64."""

from __future__ import annotations

import pytest
import torch

from contracts.pattern_examples import ALL, fitting_shape, parsed, solved_by, sparsities
from oracles.refits import least_squares
from oracles.sparsegpt import relative_error, sparsegpt
from secateur.errors import RecipeError
from secateur.quantization.int8 import dequantize_rows, quantize_rows
from secateur.sparsity.patterns import parse_pattern
from secateur.sparsity.solvers.alps import ALPS
from secateur.sparsity.solvers.obs import OBS


def check_equal(case, text, scope, sparsity, block_columns=128, damping=0.01, mask=None):
    solver, pattern = OBS(damping, block_columns=block_columns), parsed(text, scope)
    solution = solved_by(solver, case, pattern, sparsity, mask)
    weight, kept, clearance = sparsegpt(
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
        check_equal(case, text, scope, sparsity, block_columns=16)
        if kind == "plain":
            check_equal(case, text, scope, sparsity)


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


@pytest.mark.parametrize(("text", "scope"), ALL)
def test_rounding_after_a_fit_on_the_mask(text, scope, example):
    case, pattern = example(fitting_shape(text), seed=3, dead=2), parsed(text, scope)
    gram = case.statistics["gram"]
    for sparsity in sparsities(pattern):
        plain, rounding = (OBS(bits=bits, refit_steps=200) for bits in (0, 8))
        prepared = plain.prepare(case.statistics)
        mask = plain.choose(case.weight, prepared, pattern, sparsity).mask
        fitted = least_squares(case.weight, mask, case.inputs)
        wanted, _, clearance = sparsegpt(fitted, gram, text, scope, sparsity, mask=mask, bits=8)
        clear = clearance > 1e-3
        assert clear.float().mean() > 0.6
        for given in (None, mask):
            solution = solved_by(rounding, case, pattern, sparsity, given)
            assert torch.equal(solution.mask, mask)
            torch.testing.assert_close(
                solution.weight[clear], wanted.float()[clear], rtol=1e-4, atol=1e-4
            )


def solved(case, text, bits, mask=None):
    solver, scope = OBS(bits=bits), "layer" if text == "unstructured" else None
    pattern = parse_pattern(text, scope)
    return solved_by(solver, case, pattern, 0.5, mask)


def with_weak_columns(case):
    """Every eighth column has weights twice as large, and inputs a fiftieth of the size."""
    weight, inputs = case.weight.clone(), case.inputs.clone()
    weight[:, ::8] *= 2
    inputs[:, ::8] /= 50
    return type(case)(weight, inputs, {"gram": inputs.t() @ inputs})


@pytest.mark.parametrize("text", ["unstructured", "2:4"])
def test_rows_that_lose_their_largest_weight_are_packed_without_a_change(text, example):
    case = with_weak_columns(example((40, 96), seed=9))
    solution = solved(case, text, 8)
    lost = ~solution.mask.gather(1, case.weight.abs().argmax(1, keepdim=True))
    assert lost.sum() >= 8
    integers, scale = quantize_rows(solution.weight)
    torch.testing.assert_close(
        dequantize_rows(integers, scale), solution.weight, rtol=3e-7, atol=0.0
    )
    assert torch.equal(quantize_rows(solution.weight.bfloat16())[0], integers)


@pytest.mark.parametrize("text", ["unstructured", "2:4"])
def test_more_bits_lose_less(text, example):
    for seed in range(2):
        correlated = example((24, 64), seed=seed)
        inputs = torch.randn(200, 64, generator=torch.Generator().manual_seed(seed))
        independent = type(correlated)(correlated.weight, inputs, {"gram": inputs.t() @ inputs})
        for case in (correlated, independent, with_weak_columns(correlated)):
            errors = [solved(case, text, bits).error for bits in (8, 4, 3)]
            assert errors == sorted(errors)


@pytest.mark.parametrize("solver", [OBS(bits=8), ALPS(bits=8)], ids=str)
def test_a_row_of_zeros_stays_zero(solver, example):
    case = example((8, 32), seed=10)
    case.weight[3] = 0.0
    mask = torch.tensor([True, True, False, False]).repeat(8, 8)
    prepared = solver.prepare(case.statistics)
    solution = solver.solve(case.weight, prepared, mask)
    assert not solution.weight[3].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_grid_can_be_read_off_the_weights_in_any_dtype(dtype, example):
    case = example((64, 96), seed=7, dead=3)
    mask = case.statistics["stored"] != 0
    mask[5] = False
    solution = solved(case, "unstructured", 8, mask)
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
    solution = solved(pruned, "unstructured", 8, mask)
    nearest = dequantize_rows(*quantize_rows(held))
    error = relative_error(held, solution.weight, case.inputs)
    assert error == pytest.approx(float(solution.error), rel=1e-3)
    assert error < 0.75 * relative_error(held, nearest, case.inputs)


def test_unknown_bits(example):
    with pytest.raises(RecipeError, match="bits is 5"):
        OBS(bits=5)
    assert OBS(bits=8).rounds
    assert not OBS().rounds
