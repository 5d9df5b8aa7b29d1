"""Inverses of A + ρI: each exact enough, for all ρ of a range."""

from __future__ import annotations

import pytest
import torch

from secateur.errors import NumericalError
from secateur.sparsity import shifted_inverse
from secateur.sparsity.shifted_inverse import ShiftedInverse, inverse
from secateur.sparsity.solvers import solvers


def scaled_gram(inputs: int, tokens: int) -> torch.Tensor:
    """XᵀX with unit diagonal; singular if there are fewer tokens than inputs."""
    draw = torch.Generator().manual_seed(inputs)
    x = torch.randn(tokens, inputs, generator=draw) + torch.randn(tokens, 1, generator=draw)
    x /= x.norm(dim=0)
    return x.t() @ x


@pytest.mark.parametrize("size", [1, 2, 255, 257, 601])
def test_inverse_by_halves(size: int) -> None:
    matrix = scaled_gram(size, 2 * size) + 0.1 * torch.eye(size)
    kept = matrix.clone()
    found = inverse(matrix)
    expected = torch.linalg.inv(matrix.double())
    assert torch.equal(matrix, kept)
    assert torch.allclose(found, found.t(), atol=1e-4)
    assert float((found - expected).norm() / expected.norm()) < 1e-4


@pytest.mark.parametrize("high", [0.1, 0.25, 1.5, 10.0])
@pytest.mark.parametrize("tokens", [50, 400])
def test_right_to_half_a_percent_of_every_eigenvalue(high: float, tokens: int) -> None:
    matrix = scaled_gram(120, tokens)
    shifted = ShiftedInverse(matrix, 0.1, high)
    for step in range(11):
        rho = 0.1 * (high / 0.1) ** (step / 10)
        # (A + ρI) times its inverse is the identity in every direction
        product = shifted.at(rho).double() @ (matrix.double() + rho * torch.eye(120))
        off = torch.linalg.matrix_norm(product - torch.eye(120, dtype=torch.float64), ord=2)
        assert float(off) < (0.006 if high > 0.1 else 1e-4)


def test_inverses_are_made_once_and_when_needed() -> None:
    shifted = ShiftedInverse(scaled_gram(40, 90), 0.1, 1.5)
    assert "inverses" not in vars(shifted)
    shifted.at(0.2)
    made = shifted.inverses
    shifted.at(0.9)
    assert shifted.inverses is made
    assert len(made) == len(shifted.shifts) == 4


def test_matrices_of_a_size_share_the_least_squares_solutions(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    first, other = (ShiftedInverse(scaled_gram(41, tokens), 0.1, 1.5) for tokens in (90, 95))
    first.at(0.3)
    monkeypatch.delattr(torch.linalg, "lstsq")
    assert ShiftedInverse(scaled_gram(41, 99), 0.1, 1.5).shifts == other.shifts == first.shifts
    other.at(0.3)


def ruled_gram(inputs: int, tokens: int, share: float) -> torch.Tensor:
    """XᵀX with unit diagonal, whose largest eigenvalue is about `share` of the trace."""
    draw = torch.Generator().manual_seed(inputs)
    x, common = torch.randn(tokens, inputs, generator=draw), torch.randn(tokens, 1, generator=draw)
    x = share**0.5 * common / common.norm() + (1 - share) ** 0.5 * x / x.norm(dim=0)
    x /= x.norm(dim=0)
    return x.t() @ x


def off(found: torch.Tensor, matrix: torch.Tensor, shift: float) -> float:
    """‖(A + ρI)X − I‖₂ in float64."""
    identity = torch.eye(len(matrix), dtype=torch.float64)
    return float(
        torch.linalg.matrix_norm(
            (matrix.double() + shift * identity) @ found.double() - identity, ord=2
        )
    )


@pytest.mark.parametrize(
    ("tokens", "share", "shift"),
    [
        (600, 0.5, 0.1),  # by halves
        (600, 0.9, 0.1),
        (600, 0.99, 0.1),  # by Cholesky
        (600, 0.99, 0.002),  # halves fail with an error of torch's
        (100, 0.9, 0.001),  # by Cholesky in float64
    ],
)
def test_right_where_one_eigenvalue_rules(tokens: int, share: float, shift: float) -> None:
    matrix = ruled_gram(300, tokens, share)
    kept = matrix.clone()
    found = inverse(matrix, shift)
    assert found.dtype == torch.float32
    assert torch.equal(matrix, kept)
    assert off(found, matrix, shift) < 0.01
    exact = torch.linalg.inv(matrix.double() + shift * torch.eye(300, dtype=torch.float64))
    assert float((found - exact).norm() / exact.norm()) < 1e-3


def test_each_way_is_tried_only_when_the_one_before_is_off(monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[str] = []
    for name in ("_by_halves", "_by_cholesky"):
        plain = getattr(shifted_inverse, name)

        def watched(matrix, shift, *, name=name, plain=plain, **dtype):
            if dtype != {"dtype": torch.float32}:
                tried.append(name)
            return plain(matrix, shift, **dtype)

        monkeypatch.setattr(shifted_inverse, name, watched)
    inverse(ruled_gram(300, 600, 0.5), 0.1)
    inverse(ruled_gram(300, 600, 0.99), 0.1)
    assert tried == ["_by_halves", "_by_halves"]
    inverse(ruled_gram(300, 100, 0.9), 0.001)
    assert tried[2:] == ["_by_halves", "_by_cholesky"]


def test_what_float32_cannot_hold_is_refused() -> None:
    with pytest.raises(NumericalError, match=r"300 inputs plus 1e-05 .*% off"):
        inverse(ruled_gram(300, 100, 0.9), 1e-5)
    with pytest.raises(NumericalError, match="not positive definite"):
        inverse(-torch.eye(300), 0.1)


@pytest.mark.parametrize("share", [0.9, 0.99])
def test_alps_solves_where_one_eigenvalue_rules(share: float) -> None:
    gram = ruled_gram(300, 600, share)
    solver = solvers["alps"]()
    prepared = solver.prepare({"gram": gram})
    for shift in (0.1, 0.4, 1.4):
        assert off(prepared.inverse.at(shift), prepared.hessian, shift) < 0.01
