"""The error that a basis of value heads is learned by, weight by weight in float64."""

from __future__ import annotations

import torch
from torch import Tensor


def basis_error(
    values: Tensor, output: Tensor, grams: tuple[Tensor, Tensor], basis: Tensor, sparsity: float
) -> float:
    """The sum of the smallest OBS scores of both matrices, in units of the output.

    Args:
        values: [heads · size, in].
        output: [out, query heads · size]; query heads of a value head are next to each other.
        grams: the second moments of the inputs of both, before the change.
        basis: [heads, size, size].
        sparsity: the share of each matrix that is pruned, its smallest scores.
    """
    heads, size, _ = basis.shape
    readers = output.shape[1] // (heads * size)
    changes = (
        torch.block_diag(*basis.double()),
        torch.block_diag(*(one for one in basis.double() for _ in range(readers))),
    )
    weights = changes[0] @ values.double(), output.double() @ torch.linalg.inv(changes[1])
    # in the stored basis, where damping is added; then H⁻¹ changes as the inverse of a gram does
    inverses = []
    for gram in grams:
        moment = gram.double()
        damping = 0.01 * moment.diagonal().mean() * torch.eye(len(moment), dtype=torch.float64)
        inverses.append(torch.linalg.inv(moment + damping))
    back = torch.linalg.inv(changes[1])
    inverses[1] = back.t() @ inverses[1] @ back
    reading = [
        sum(
            float(weights[1][:, (head * readers + reader) * size + i].square().sum())
            for reader in range(readers)
        )
        for head in range(heads)
        for i in range(size)
    ]
    total = 0.0
    for weight, inverse, each in ((weights[0], inverses[0], reading), (weights[1], inverses[1], 0)):
        scores = sorted(
            float(weight[i, j] ** 2 / inverse[j, j]) * (each[i] if each else 1.0)
            for i in range(weight.shape[0])
            for j in range(weight.shape[1])
        )
        total += sum(scores[: round(sparsity * len(scores))])
    return total
