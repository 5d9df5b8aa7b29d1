"""Refits of a given mask, row by row in float64."""

from __future__ import annotations

import torch
from torch import Tensor

from oracles.scores import damped_hessian


def mean_damping(inputs: Tensor, damping: float) -> float:
    """λ = damping · the mean of Σ_t x_tj²."""
    return damping * float(inputs.double().square().sum(0).mean())


def least_squares(weight: Tensor, mask: Tensor, inputs: Tensor, damping: float = 0.01) -> Tensor:
    """The least ‖X(w − ŵ)‖² + λ‖w − ŵ‖² of each row, from the inputs: no gram, no normal equations.

    The damping is λ^½ more tokens, one for every input.
    """
    x, columns = inputs.double(), weight.shape[1]
    root = mean_damping(inputs, damping) ** 0.5
    tokens = torch.cat([x, root * torch.eye(columns, dtype=torch.float64)])
    alive = x.abs().sum(0) > 0
    refit = torch.zeros(weight.shape, dtype=torch.float64)
    for i, row in enumerate(weight.double()):
        kept = (mask[i] & alive).nonzero()[:, 0]
        wanted = tokens[:, alive] @ row[alive]
        if len(kept):
            refit[i, kept] = torch.linalg.lstsq(tokens[:, kept], wanted, driver="gelsd").solution
    return refit


def admm(
    weight: Tensor,
    mask: Tensor,
    gram: Tensor,
    damping: float = 0.01,
    rho: float = 1.0,
    iterations: int = 20,
) -> Tensor:
    """Algorithm 1 of arXiv:2401.02938 with its scaling, one row at a time."""
    hessian, dead = damped_hessian(gram, damping)
    norm = hessian.diagonal().sqrt()
    a = hessian / norm[:, None] / norm[None, :]
    inverse = torch.linalg.inv(a + rho * torch.eye(len(a), dtype=torch.float64))
    refit = torch.zeros(weight.shape, dtype=torch.float64)
    for i, row in enumerate(weight.double()):
        b = row * norm
        b[dead] = 0.0
        z = torch.where(mask[i], b, 0.0)
        u = b - z
        for _ in range(iterations):
            w = inverse @ (a @ b + rho * (z - u))
            z = torch.where(mask[i], w + u, 0.0)
            u = u + w - z
        refit[i] = z / norm
    return refit


def damped_error(weight: Tensor, refit: Tensor, inputs: Tensor, damping: float = 0.01) -> float:
    """‖(W − Ŵ)X‖² + λ‖W − Ŵ‖², the columns of dead inputs left out."""
    alive = inputs.abs().sum(0) > 0
    change = (weight.double() - refit.double())[:, alive]
    outputs = inputs.double()[:, alive] @ change.t()
    return float(outputs.square().sum() + mean_damping(inputs, damping) * change.square().sum())
