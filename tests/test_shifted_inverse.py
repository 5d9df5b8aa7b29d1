"""Inverses of A + ρI: each exact enough, for all ρ of a range."""

from __future__ import annotations

import pytest
import torch

from secateur.sparsity.shifted_inverse import ShiftedInverse, inverse


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
