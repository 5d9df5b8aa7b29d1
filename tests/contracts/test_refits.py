"""The solvers `least-squares` and `admm` against their formulas, and against each other."""

from __future__ import annotations

import pytest
import torch

from contracts.pattern_examples import ALL, fitting_shape, parsed, sparsities
from oracles import refits as oracles
from oracles.sparsegpt import relative_error
from secateur.errors import NumericalError, RecipeError
from secateur.sparsity.solvers import least_squares as module
from secateur.sparsity.solvers.admm import ADMM
from secateur.sparsity.solvers.least_squares import LeastSquares
from secateur.sparsity.solvers.obs import OBS
from secateur.sparsity.solvers.zeroing import Zeroing


def refit(solver, case, mask):
    """The refitted weight; the pattern is not consulted."""
    prepared = solver.prepare(case.statistics)
    return solver.solve(case.weight, prepared, mask).weight


def masks_of(text, scope, case):
    pattern = parsed(text, scope)
    return [pattern.mask(case.weight.float().abs(), s) for s in sparsities(pattern)]


@pytest.mark.parametrize(
    ("kind", "text", "scope"),
    [("plain", *one) for one in ALL]
    + [
        (kind, *one)
        for kind in ("tied", "dead", "bfloat16")
        for one in (("unstructured", "row"), ("3:5", None), ("16x1", None))
    ],
)
def test_equal_their_formulas(kind, text, scope, example):
    case = example(
        fitting_shape(text),
        seed=3,
        tied=kind == "tied",
        dead=5 if kind == "dead" else 0,
        dtype=torch.bfloat16 if kind == "bfloat16" else torch.float32,
    )
    for mask in masks_of(text, scope, case):
        exact = oracles.least_squares(case.weight, mask, case.inputs).float()
        torch.testing.assert_close(refit(LeastSquares(), case, mask), exact, rtol=1e-3, atol=1e-3)
        iterated = oracles.admm(case.weight, mask, case.statistics["gram"]).float()
        torch.testing.assert_close(refit(ADMM(), case, mask), iterated, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("damping", [0.0, 0.01, 0.3])
@pytest.mark.parametrize("text", ["unstructured", "2:4", "1:4", "16x1"])
def test_the_exact_refit_is_the_best_and_none_is_worse_than_zeros(damping, text, example):
    case = example((16, 48), seed=6, dead=2)
    for mask in masks_of(text, None, case):

        def error(solver, mask=mask):
            return oracles.damped_error(
                case.weight, refit(solver, case, mask), case.inputs, damping
            )

        exact, swept = error(LeastSquares(damping)), error(OBS(damping))
        early, late = error(ADMM(damping)), error(ADMM(damping, iterations=300))
        zeroed = error(Zeroing())
        hair, speck = 1 + 1e-5, 1e-6
        assert exact <= late * hair + speck
        assert exact <= early * hair + speck
        assert exact <= swept * hair + speck
        assert late <= early * hair + speck
        assert early <= zeroed * hair + speck
        assert late <= 1.01 * exact + speck


def test_exact_refit_without_damping_is_never_above_zeros_for_a_plain_error_either(example):
    case = example((9, 40), seed=8)
    for mask in masks_of("unstructured", "layer", case):
        zeroed = relative_error(case.weight, case.weight * mask, case.inputs)
        for damping in (0.0, 0.01, 1.0):
            new = refit(LeastSquares(damping), case, mask)
            assert relative_error(case.weight, new, case.inputs) <= zeroed * (1 + 1e-5)


def test_rows_with_the_same_zeros_share_a_factorisation(example, monkeypatch):
    case = example((12, 30), seed=2)
    pair = torch.rand(2, 30, generator=torch.Generator().manual_seed(0)) > 0.5
    mask = pair[torch.tensor([0, 1, 1, 0, 1, 0, 1, 1, 1, 0, 0, 1])]
    factorised = []

    def counting(hessian):
        factorised.append(len(hessian))
        return torch.linalg.cholesky(hessian)

    monkeypatch.setattr(module, "cholesky", counting)
    new = refit(LeastSquares(), case, mask)
    assert sum(factorised) == 2
    exact = oracles.least_squares(case.weight, mask, case.inputs).float()
    torch.testing.assert_close(new, exact, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("entries", [1, 500, 3000])
def test_chunks_of_any_size(entries, example, monkeypatch):
    case = example((13, 31), seed=5)
    mask = torch.rand(13, 31, generator=torch.Generator().manual_seed(1)) > 0.6
    mask[3], mask[7], mask[8] = False, True, mask[2]
    monkeypatch.setattr(module, "_CHUNK_ENTRIES", entries)
    exact = oracles.least_squares(case.weight, mask, case.inputs).float()
    torch.testing.assert_close(refit(LeastSquares(), case, mask), exact, rtol=1e-3, atol=1e-3)


def test_ill_conditioned_support_is_taken_to_float64(example):
    # Without damping, float32 leaves no digit of the small pivots of inputs this alike.
    random = torch.Generator().manual_seed(0)
    x = torch.randn(400, 30, generator=random).double()
    x[:, 1::2] = x[:, ::2] + 2.5e-3 * x[:, 1::2]
    weight = torch.randn(4, 30, generator=random)
    mask = torch.rand(4, 30, generator=random) > 0.2
    gram = (x.t() @ x).float()
    solver = LeastSquares(damping=0.0)
    solution = solver.solve(weight, solver.prepare({"gram": gram}), mask)
    best = oracles.least_squares(weight, mask, x, 0.0)
    reached = relative_error(weight, solution.weight, x)
    assert reached <= 1.01 * relative_error(weight, best, x) + 1e-9


def test_singular_gram_without_damping_is_an_error():
    ones = torch.ones(50, 6)
    mask = torch.tensor([[True, True, True, False, True, False]])
    for solver in (LeastSquares(damping=0.0), ADMM(damping=0.0, rho=1e-9)):
        with pytest.raises(NumericalError, match="larger"):
            solver.solve(torch.ones(1, 6), solver.prepare({"gram": ones.t() @ ones}), mask)


@pytest.mark.parametrize("solver", [LeastSquares(), ADMM()])
def test_what_is_no_number_is_refused(solver):
    weight = torch.ones(3, 4)
    weight[1, 1] = float("nan")
    prepared = solver.prepare({"gram": torch.eye(4)})
    with pytest.raises(NumericalError, match="infinite values or NaN"):
        solver.solve(weight, prepared, weight > 0)
    with pytest.raises(NumericalError, match="is zero"):
        solver.prepare({"gram": torch.zeros(4, 4)})
    gram = torch.eye(4)
    gram[2, 2] = float("inf")
    with pytest.raises(NumericalError, match="1 of 4 calibration inputs"):
        solver.prepare({"gram": gram})


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"rho": 0.0}, "rho is 0"),
        ({"rho": float("nan")}, "rho is nan"),
        ({"iterations": 0}, "iterations is 0"),
        ({"damping": -1.0}, "damping is -1"),
    ],
)
def test_impossible_parameters_are_refused(arguments, said):
    with pytest.raises(RecipeError, match=said):
        ADMM(**arguments)
