"""Whole units: the solver `osscar` against removal one by one, the scores over a unit, the bias."""

from __future__ import annotations

import pytest
import torch

from contracts.pattern_examples import parsed
from oracles.refits import damped_error, least_squares
from oracles.units import greedy_units
from secateur.errors import PatternError, RecipeError
from secateur.sparsity.methods import compose
from secateur.sparsity.solvers.bias import Bias
from secateur.sparsity.solvers.least_squares import LeastSquares
from secateur.sparsity.solvers.osscar import OSSCAR


def solved(case, text, sparsity, **parameters):
    solver = OSSCAR(**parameters)
    prepared = solver.prepare(case.statistics)
    return solver.choose(case.weight, prepared, parsed(text, None), sparsity)


@pytest.mark.parametrize(("text", "count"), [("*x1", 5), ("*x1", 1), ("*x3", 2), ("*x3/2", 4)])
@pytest.mark.parametrize("dead", [0, 2])
def test_greedy_removal_equals_refitting_every_candidate(text, count, dead, example):
    case, width = example((6, 18), seed=3, dead=dead), int(text[2])
    solution = solved(case, text, count * width / 18, batch=1)
    mask = greedy_units(case.weight, case.inputs, width, count)
    assert torch.equal(solution.mask, mask)
    exact = least_squares(case.weight, mask, case.inputs).float()
    torch.testing.assert_close(solution.weight, exact, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(("text", "count"), [("*x1@3", 1), ("*x1@9", 4), ("*x3@2", 1)])
def test_greedy_removal_takes_as_many_among_a_few(text, count, example):
    case = example((6, 18), seed=5)
    width, among = int(text[2]), int(text[4])
    solution = solved(case, text, count / among)
    mask = greedy_units(case.weight, case.inputs, width, count * 18 // (width * among), among)
    assert torch.equal(solution.mask, mask)
    assert (mask[0, ::width].view(-1, among).sum(1) == among - count).all()


@pytest.mark.parametrize("text", ["*x1", "*x4"])
@pytest.mark.parametrize("score", ["activation", "fluctuation", "wanda"])
def test_less_is_lost_than_by_a_score_and_by_zeros(text, score, example):
    for seed in range(4):
        case = example((16, 48), seed=seed)
        method = compose(None, text, score=score)
        mask = method.solve(case.weight, None, case.statistics, 0.25).mask
        refit = LeastSquares()
        fitted = refit.solve(case.weight, refit.prepare(case.statistics), mask)
        found = solved(case, text, 0.25)
        weights = (found.weight, fitted.weight, case.weight * mask)
        best, scored, zeroed = (damped_error(case.weight, w, case.inputs) for w in weights)
        assert best <= scored <= zeroed


@pytest.mark.parametrize("batch", [2, 8, 1000])
def test_batches_lose_little_more(batch, example):
    case = example((16, 64), seed=1)
    alone, together = solved(case, "*x1", 0.5, batch=1), solved(case, "*x1", 0.5, batch=batch)
    assert int(together.mask.sum()) == int(alone.mask.sum())
    assert alone.error is not None
    assert together.error is not None
    assert together.error <= 1.5 * alone.error


def test_everything_may_go(example):
    solution = solved(example((4, 12)), "*x3", 1.0)
    assert not solution.mask.any()
    assert not solution.weight.any()
    assert solution.error == pytest.approx(1.0, rel=1e-4)


def test_units_are_refused_where_there_are_none():
    for method in (
        compose(None, "2:4", score="obs", solver="osscar"),
        compose(None, "unstructured", score="coupled-taylor"),
    ):
        with pytest.raises(PatternError, match="chooses whole columns"):
            method.check((8, 8), 0.5)
    compose(None, "unstructured", score="wanda", solver="osscar").check((8, 8), 0.5)
    with pytest.raises(RecipeError, match="batch is 0"):
        OSSCAR(batch=0)


@pytest.mark.parametrize("width", [1, 4])
def test_coupled_taylor_is_the_derivative_by_a_gate_on_the_unit(width, example):
    case = example((6, 12))
    weight, inputs = case.weight, case.inputs
    gate = torch.ones(12 // width, requires_grad=True)
    wanted = torch.randn(len(inputs), 6, generator=torch.Generator().manual_seed(9))
    gated = inputs * gate.repeat_interleave(width)
    loss = ((gated @ weight.t() - wanted) ** 2).mean()
    (by_gate,) = torch.autograd.grad(loss, gate)
    leaf = weight.clone().requires_grad_()
    (by_weight,) = torch.autograd.grad(((inputs @ leaf.t() - wanted) ** 2).mean(), leaf)
    method = compose(None, f"*x{width}", score="coupled-taylor")
    units = method.pattern.units(method.score(weight, {"gradient": by_weight}))
    torch.testing.assert_close(units[0], by_gate.abs(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("width", [1, 4])
def test_activation_is_the_energy_of_the_unit(width, example):
    case = example((6, 12))
    method = compose(None, f"*x{width}", score="activation")
    units = method.pattern.units(method.score(case.weight, case.statistics))
    energy = case.inputs.unflatten(1, (-1, width)).square().sum(dim=(0, 2))
    torch.testing.assert_close(units[0], energy)


def test_the_bias_keeps_the_mean_output(example):
    case = example((6, 12))
    inputs = case.inputs + 1.5
    mask = torch.rand(6, 12, generator=torch.Generator().manual_seed(2)) > 0.4
    solver = Bias()
    prepared = solver.prepare({"column_mean": inputs.mean(0)})
    solution = solver.solve(case.weight, prepared, mask)
    assert solution.shift is not None
    outputs = inputs @ solution.weight.t() + solution.shift
    torch.testing.assert_close(outputs.mean(0), (inputs @ case.weight.t()).mean(0))
