"""ALPS in float64: the iteration of the paper with explicit inverses, then exact least squares."""

from __future__ import annotations

import torch
from torch import Tensor

from oracles.scores import damped_hessian


def largest(squares: Tensor, kept: int) -> Tensor:
    """Mask of the `kept` largest entries of a whole matrix, later ones first on a tie."""
    flat = squares.flatten().tolist()
    order = sorted(range(len(flat)), key=lambda i: (flat[i], i))
    mask = torch.zeros(len(flat), dtype=torch.bool)
    mask[order[len(flat) - kept :]] = True
    return mask.reshape(squares.shape)


def alps(
    weight: Tensor,
    gram: Tensor,
    kept: int,
    *,
    damping: float = 0.01,
    iterations: int = 45,
    rho: float = 0.1,
    growth: float = 1.2,
) -> tuple[Tensor, Tensor]:
    """Weights and mask from the gram, without dead columns; ends when no weight changes places."""
    hessian, _ = damped_hessian(gram, damping)
    scale = hessian.diagonal().sqrt()
    scaled = hessian / scale / scale[:, None]
    start = weight.double() * scale
    target = start @ scaled
    support = largest(start.square(), kept)
    agreed = start * support
    dual = torch.zeros_like(start)
    eye = torch.eye(len(scaled), dtype=torch.float64)
    for iteration in range(iterations):
        penalty = rho * growth ** (iteration / 3)
        free = (target - dual + penalty * agreed) @ torch.linalg.inv(scaled + penalty * eye)
        agreed = free + dual / penalty
        agreed = agreed * largest(agreed.square(), kept)
        dual = dual + penalty * (free - agreed)
        if iteration % 3 == 2:
            if torch.equal(support, agreed != 0):
                break
            support = agreed != 0
    mask = largest(free.square(), kept)
    solved = torch.zeros_like(start)
    for row in range(len(start)):
        kept_here = mask[row].nonzero()[:, 0]
        block = scaled[kept_here][:, kept_here]
        solved[row, kept_here] = torch.linalg.solve(block, target[row, kept_here])
    return solved / scale, mask
