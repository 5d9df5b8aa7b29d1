"""Factorisations that work, that need float64, and that must fail."""

from __future__ import annotations

import pytest
import torch

from oracles.scores import damped_hessian, obs_by_removal
from oracles.sparsegpt import relative_error
from secateur.errors import NumericalError, RecipeError
from secateur.sparsity.hessian import inverse_factor, output_energy, relative_output_error
from secateur.sparsity.scores import scores
from secateur.sparsity.scores.obs import obs
from secateur.sparsity.solvers.obs import OBS


def inputs(tokens: int, columns: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(tokens, columns, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("columns", [1, 2, 255, 257, 600])
def test_factor_of_the_inverse(columns):
    x = inputs(2 * columns, columns)
    factor, dead = inverse_factor(x.t() @ x, 0.01)
    assert not dead.any()
    assert not factor.tril(-1).any()
    hessian, _ = damped_hessian(x.t() @ x)
    product = factor.double().t() @ factor.double() @ hessian
    torch.testing.assert_close(product, torch.eye(columns, dtype=torch.float64), rtol=0, atol=2e-4)


@pytest.mark.parametrize("tokens", [1, 5])
def test_fewer_tokens_than_inputs(tokens):
    x = inputs(tokens, 40)
    factor, _ = inverse_factor(x.t() @ x, 0.01)
    hessian, _ = damped_hessian(x.t() @ x)
    expected = torch.linalg.cholesky(torch.linalg.inv(hessian), upper=True)
    torch.testing.assert_close(factor.double(), expected, rtol=1e-3, atol=1e-4)


def test_scale_of_the_inputs_does_not_matter():
    x = inputs(100, 20)
    x[:, 3] = 0
    weight = inputs(7, 20, seed=1)
    masks = []
    for scale in (1e-6, 1.0, 1e6):
        gram = (scale * x).t() @ (scale * x)
        score = obs(weight, {"gram": gram})
        masks.append(score > score.median())
    assert torch.equal(masks[0], masks[1])
    assert torch.equal(masks[1], masks[2])


def test_ill_conditioned_gram_is_taken_to_float64():
    # Without damping, float32 leaves no digit of the small pivots of inputs this alike.
    x = inputs(400, 30).double()
    x[:, 1::2] = x[:, ::2] + 2.5e-3 * x[:, 1::2]
    gram = (x.t() @ x).float()
    factor, _ = inverse_factor(gram, 0.0)
    expected = torch.linalg.cholesky(torch.linalg.inv(gram.double()), upper=True)
    torch.testing.assert_close(factor.double(), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("part", [scores["obs"](damping=0.0), OBS(damping=0.0)])
def test_singular_gram_without_damping_is_an_error(part):
    x = torch.ones(50, 6)
    statistics = {"gram": x.t() @ x}
    with pytest.raises(NumericalError, match="larger damping"):
        part.prepare(statistics) if isinstance(part, OBS) else part(torch.ones(2, 6), statistics)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_gram_that_overflowed_is_an_error(bad):
    gram = torch.eye(4)
    gram[2, 2] = bad
    with pytest.raises(NumericalError, match="1 of 4 calibration inputs"):
        inverse_factor(gram, 0.01)


def test_linear_that_saw_no_token_is_an_error():
    with pytest.raises(NumericalError, match="is zero"):
        OBS().prepare({"gram": torch.zeros(4, 4)})


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_weight_that_overflowed_is_an_error(bad):
    from secateur.sparsity.patterns import parse_pattern

    weight = torch.ones(3, 4)
    weight[1, 1] = bad
    solver = OBS()
    with pytest.raises(NumericalError, match="infinite values or NaN"):
        solver.choose(weight, solver.prepare({"gram": torch.eye(4)}), parse_pattern("2:4"), 0.5)


@pytest.mark.parametrize("damping", [-0.1, float("nan"), float("inf")])
@pytest.mark.parametrize("part", [OBS, scores["obs"]])
def test_impossible_damping_is_refused(part, damping):
    with pytest.raises(RecipeError, match="damping"):
        part(damping=damping)


def test_obs_score_is_the_error_of_the_best_removal():
    x, weight = inputs(60, 8), inputs(3, 8, seed=1)
    gram = x.t() @ x
    score = obs(weight, {"gram": gram})
    for row, column in [(0, 0), (1, 5), (2, 7)]:
        best = obs_by_removal(weight, gram, row, column)
        assert float(score[row, column]) == pytest.approx(best, rel=1e-4)


@pytest.mark.parametrize("columns", [1, 256, 300, 513])
def test_output_error(columns):
    x, weight = inputs(70, columns), inputs(5, columns, seed=1)
    new = weight * (weight.abs() > 0.5)
    gram = x.t() @ x
    energy = float((x.double() @ weight.double().t()).square().sum())
    assert output_energy(weight, gram) == pytest.approx(energy, rel=1e-5)
    error = relative_output_error(weight, new, gram)
    assert error == pytest.approx(relative_error(weight, new, x), rel=1e-4)


def test_output_error_of_silent_outputs_is_zero():
    assert relative_output_error(torch.zeros(2, 3), torch.ones(2, 3), torch.eye(3)) == 0.0
    assert relative_output_error(torch.ones(2, 3), torch.zeros(2, 3), torch.zeros(3, 3)) == 0.0
