"""The error that a rotation of value heads is learned by, weight by weight in float64."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def basis_error(
    values: Tensor, output: Tensor, grams: tuple[Tensor, Tensor], rotation: Tensor, sparsity: float
) -> float:
    """log of the smallest OBS scores of the turned values, plus that of the turned output.

    Args:
        values: [heads · size, in].
        output: [out, query heads · size]; query heads of a value head are next to each other.
        grams: the second moments of the inputs of both, before the turn.
        rotation: [heads, size, size].
        sparsity: the share of each matrix that is pruned, its smallest scores.
    """
    heads, size, _ = rotation.shape
    readers = output.shape[1] // (heads * size)
    turns = (
        torch.block_diag(*rotation.double()),
        torch.block_diag(*(one for one in rotation.double() for _ in range(readers))),
    )
    weights = turns[0] @ values.double(), output.double() @ torch.linalg.inv(turns[1])
    moments = grams[0].double(), turns[1] @ grams[1].double() @ turns[1].t()
    total = 0.0
    for weight, moment in zip(weights, moments, strict=True):
        damping = 0.01 * moment.diagonal().mean() * torch.eye(len(moment), dtype=torch.float64)
        inverse = torch.linalg.inv(moment + damping)
        scores = sorted(
            float(weight[i, j] ** 2 / inverse[j, j])
            for i in range(weight.shape[0])
            for j in range(weight.shape[1])
        )
        total += math.log(sum(scores[: round(sparsity * len(scores))]))
    return total
