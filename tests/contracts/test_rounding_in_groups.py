"""Rounding to 2, 3 and 4 bits: the sweep and the descent against slow oracles, and the solvers."""

from __future__ import annotations

import pytest
import torch

from contracts.pattern_examples import parsed, solved_by
from oracles import group_rounding as oracle
from oracles.scores import damped_hessian
from oracles.sparsegpt import relative_error
from secateur.errors import PatternError, RecipeError
from secateur.quantization.groups import GroupGrid
from secateur.quantization.sweep_grids import GroupColumns, descend
from secateur.sparsity.column_sweep import Choice, sweep
from secateur.sparsity.hessian import inverse_factor
from secateur.sparsity.solvers.alps import ALPS
from secateur.sparsity.solvers.obs import OBS

GRIDS = [GroupGrid(4, 32), GroupGrid(3, 64), GroupGrid(4, 128), GroupGrid(2, 32)]
SOLVERS = [
    OBS(bits=4, group=32),
    OBS(bits=3),
    OBS(bits=2, group=32),
    ALPS(bits=4),
    ALPS(bits=3, group=32),
]


def swept(case, grid, mask=None, choice=None):
    """The weight [out, in] after our sweep, its mask, and its grid."""
    factor, dead = inverse_factor(case.statistics["gram"], 0.01)
    columns = case.weight.float().t().clone()
    columns[dead] = 0.0
    kept = torch.zeros(columns.shape, dtype=torch.bool) if mask is None else mask.t().clone()
    on = GroupColumns(grid, columns)
    sweep(columns, kept, factor, choice=choice, grid=on)
    return columns.t(), kept.t(), on


def agree(found, wanted, clearance, least=0.5):
    """The rows without a tie are the same."""
    clear = clearance > 1e-3
    assert clear.float().mean() >= least
    torch.testing.assert_close(found[clear], wanted.float()[clear], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("columns", [40, 150])
def test_the_sweep_on_a_given_mask(grid, columns, example):
    case = example((24, columns), seed=1, dead=2)
    mask = case.statistics["stored"] != 0
    weight, _kept, clearance = oracle.sweep(
        case.weight, case.statistics["gram"], grid.bits, grid.group, mask=mask
    )
    found, _, _ = swept(case, grid, mask=mask)
    agree(found, weight, clearance, 0.3)
    assert not found[~mask].any()


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize(
    ("text", "scope"), [("unstructured", "row"), ("unstructured", "layer"), ("2:4", None)]
)
def test_the_sweep_that_chooses_the_mask(grid, text, scope, example):
    case = example((16, 160), seed=2)
    weight, kept, clearance = oracle.sweep(
        case.weight, case.statistics["gram"], grid.bits, grid.group, text=text, scope=scope
    )
    found, ours, _ = swept(case, grid, choice=Choice(parsed(text, scope), 0.5))
    first = slice(0, 128 if scope else grid.group)  # a row that met a tie ends elsewhere
    assert (ours == kept)[:, first].float().mean() > 0.97
    if scope != "layer":
        agree(found, weight, clearance, 0.2)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_the_descent(grid, example):
    case = example((20, 100), seed=3, dead=1)
    mask = case.statistics["stored"] != 0
    gram = case.statistics["gram"]
    hessian, _ = damped_hessian(gram)
    found, _, on = swept(case, grid, mask=mask)
    columns, target = found.t().contiguous(), case.weight.float()
    target = target.masked_fill(gram.diagonal() == 0, 0.0)
    scales = on.scale.t().clone()
    for passes in (1, 2):
        wanted, clearance = oracle.descend(
            columns.t(), target, scales, hessian, mask, grid.bits, grid.group, passes
        )
        ours, again = columns.clone(), GroupColumns(grid, columns)
        again.exponent, again.scale = on.exponent, scales.t().clone()
        diagonal = hessian.diagonal().float()
        descend(ours, again, target.t(), mask.t(), gram, diagonal, passes)
        agree(ours.t(), wanted, clearance, 0.3)


@pytest.mark.parametrize("solver", SOLVERS, ids=str)
@pytest.mark.parametrize(("text", "given"), [("unstructured", True), ("2:4", True), ("2:4", False)])
def test_a_solution_is_on_its_grid_and_its_zeros_stay(solver, text, given, example):
    case = example((12, 96), seed=4, dead=2)
    pattern = parsed(text, "layer" if text == "unstructured" else None)
    mask = pattern.mask(case.weight.abs().float(), 0.5) if given else None
    solution = solved_by(solver, case, pattern, 0.5, mask)
    assert not solution.weight[~solution.mask].any()
    assert int(solution.mask.sum()) == case.weight.numel() // 2
    if given:
        assert torch.equal(solution.mask, mask)
    grid = GroupGrid(solver.bits, solver.group)
    stored = solution.weight.bfloat16()
    assert torch.equal(grid.dequantize(*grid.quantize(stored)), solution.weight)
    error = relative_error(case.weight, solution.weight, case.inputs)
    assert solution.error == pytest.approx(error, rel=1e-3)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_each_step_after_the_sweep_lowers_the_error(bits, example):
    case = example((48, 128), seed=5)
    pattern = parsed("unstructured", "layer")
    mask = pattern.mask(case.weight.abs() * case.statistics["column_norm"], 0.5)
    plain, _, _ = swept(case, GroupGrid(bits, 64), mask=mask)
    errors = [relative_error(case.weight, plain, case.inputs)]
    for descent in (0, 1, 4):
        solver = OBS(bits=bits, descent=descent)
        prepared = solver.prepare(case.statistics)
        errors.append(solver.solve(case.weight, prepared, mask).error)
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.8 * errors[0]


def test_int8_and_alps(example):
    case = example((32, 64), seed=6)
    pattern = parsed("unstructured", "layer")
    error = {}
    for bits in (0, 8, 4, 3, 2):
        solver = ALPS(bits=bits)
        prepared = solver.prepare(case.statistics)
        error[bits] = solver.choose(case.weight, prepared, pattern, 0.5).error
        assert solver.rounds == (bits > 0)
    assert error[0] < error[8] < 1.05 * error[0]
    assert error[8] < error[4] < error[3] < error[2]


def test_what_cannot_be_rounded_is_refused(example):
    with pytest.raises(RecipeError, match="bits is 5"):
        OBS(bits=5)
    with pytest.raises(RecipeError, match="group is 48"):
        ALPS(bits=4, group=48)
    with pytest.raises(RecipeError, match="descent is -1"):
        OBS(bits=4, descent=-1)
    solver, case = OBS(bits=4), example((4, 80))
    with pytest.raises(PatternError, match="do not divide"):
        solver.choose(case.weight, solver.prepare(case.statistics), parsed("2:5", None), 0.6)
