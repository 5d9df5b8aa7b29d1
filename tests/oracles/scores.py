"""Scores, weight by weight, in float64."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def each(weight: Tensor, value) -> Tensor:
    """A matrix of value(i, j)."""
    rows, columns = weight.shape
    return torch.tensor(
        [[value(i, j) for j in range(columns)] for i in range(rows)], dtype=torch.float64
    )


def magnitude(weight: Tensor, statistics: dict[str, Tensor]) -> Tensor:
    w = weight.double().tolist()
    return each(weight, lambda i, j: abs(w[i][j]))


def wanda(weight: Tensor, statistics: dict[str, Tensor]) -> Tensor:
    w, norm = weight.double().tolist(), statistics["column_norm"].double().tolist()
    return each(weight, lambda i, j: abs(w[i][j]) * norm[j])


def ria(weight: Tensor, statistics: dict[str, Tensor], a: float = 0.5) -> Tensor:
    w, norm = weight.double().tolist(), statistics["column_norm"].double().tolist()
    row_sum = [sum(abs(x) for x in row) for row in w]
    column_sum = [sum(abs(row[j]) for row in w) for j in range(len(norm))]

    def share(x: float, total: float) -> float:
        return abs(x) / total if total else 0.0

    return each(
        weight,
        lambda i, j: (share(w[i][j], column_sum[j]) + share(w[i][j], row_sum[i])) * norm[j] ** a,
    )


def kept(weight: Tensor, statistics: dict[str, Tensor]) -> Tensor:
    stored = statistics["stored"].tolist()
    return each(weight, lambda i, j: 0.0 if stored[i][j] == 0 else 1.0)


def taylor(weight: Tensor, statistics: dict[str, Tensor]) -> Tensor:
    w, gradient = weight.double().tolist(), statistics["gradient"].double().tolist()
    return each(weight, lambda i, j: abs(w[i][j] * gradient[i][j]))


def obd(weight: Tensor, statistics: dict[str, Tensor]) -> Tensor:
    w, fisher = weight.double().tolist(), statistics["fisher"].double().tolist()
    return each(weight, lambda i, j: 0.5 * fisher[i][j] * w[i][j] ** 2)


def damped_hessian(gram: Tensor, damping: float = 0.01) -> tuple[Tensor, list[int]]:
    """H of the layer-wise squared error, and the columns whose inputs were always zero."""
    gram = gram.double()
    n = len(gram)
    mean = sum(float(gram[j, j]) for j in range(n)) / n
    dead = [j for j in range(n) if gram[j, j] == 0]
    hessian = gram + damping * mean * torch.eye(n, dtype=torch.float64)
    for j in dead:
        hessian[j, j] = 1.0
    return hessian, dead


def obs(weight: Tensor, statistics: dict[str, Tensor], damping: float = 0.01) -> Tensor:
    hessian, dead = damped_hessian(statistics["gram"], damping)
    inverse = torch.linalg.inv(hessian).tolist()
    w = weight.double().tolist()
    return each(weight, lambda i, j: 0.0 if j in dead else w[i][j] ** 2 / inverse[j][j])


def obs_by_removal(weight: Tensor, gram: Tensor, row: int, column: int) -> float:
    """The least Δ H Δᵀ over all changes Δ of one row that make one weight zero, solved for."""
    hessian, _ = damped_hessian(gram)
    others = [j for j in range(len(hessian)) if j != column]
    w = float(weight[row, column])
    # With Δ_column = −w, the best Δ of the others solves H_oo Δ_o = w · H_o,column.
    best = torch.linalg.solve(hessian[others][:, others], w * hessian[others, column])
    change = torch.zeros(len(hessian), dtype=torch.float64)
    change[others], change[column] = best, -w
    return float(change @ hessian @ change)


def column_norm(x: Tensor) -> Tensor:
    rows = x.double().tolist()
    return torch.tensor(
        [math.sqrt(sum(row[j] ** 2 for row in rows)) for j in range(x.shape[1])],
        dtype=torch.float64,
    )


def gram(x: Tensor) -> Tensor:
    return x.double().t() @ x.double()


def column_mean(x: Tensor) -> Tensor:
    rows = x.double().tolist()
    return torch.tensor(
        [sum(row[j] for row in rows) / len(rows) for j in range(x.shape[1])], dtype=torch.float64
    )


def column_variance(x: Tensor) -> Tensor:
    rows, means = x.double().tolist(), column_mean(x).tolist()
    return torch.tensor(
        [sum((row[j] - mean) ** 2 for row in rows) / len(rows) for j, mean in enumerate(means)],
        dtype=torch.float64,
    )


def activation(weight: Tensor, statistics: dict[str, Tensor]) -> Tensor:
    norm, rows = statistics["column_norm"].double().tolist(), weight.shape[0]
    return each(weight, lambda i, j: norm[j] ** 2 / rows)


def fluctuation(weight: Tensor, statistics: dict[str, Tensor]) -> Tensor:
    w, variance = weight.double().tolist(), statistics["column_variance"].double().tolist()
    return each(weight, lambda i, j: w[i][j] ** 2 * variance[j])


def coupled_taylor(weight: Tensor, statistics: dict[str, Tensor]) -> Tensor:
    w, gradient = weight.double().tolist(), statistics["gradient"].double().tolist()
    return each(weight, lambda i, j: w[i][j] * gradient[i][j])
