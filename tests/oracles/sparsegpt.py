"""SparseGPT, Algorithm 1 of arXiv:2301.00774, column by column in float64."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from oracles import patterns
from oracles.scores import damped_hessian


def sparsegpt(
    weight: Tensor,
    gram: Tensor,
    text: str,
    scope: str | None,
    sparsity: float,
    *,
    damping: float = 0.01,
    block_columns: int = 128,
    mask: Tensor | None = None,
    bits: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """The pruned weight, its mask, and how far each row stays from a tie between two integers.

    With 8 bits, rounded in the same sweep (GPTQ). A row that comes close to a tie, in steps of its
    grid, may be rounded to the other side by arithmetic in float32, and goes its own way after.
    """
    w = weight.double().clone()
    columns = w.shape[1]
    hessian, dead = damped_hessian(gram, damping)
    w[:, dead] = 0.0
    # The rows of the upper Cholesky factor of H⁻¹ are those of the paper's sequence of inverses.
    factor = torch.linalg.cholesky(torch.linalg.inv(hessian), upper=True)
    diagonal = factor.diagonal()
    kept = torch.ones(w.shape, dtype=torch.bool) if mask is None else mask.clone()
    width = selection_width(text, block_columns)
    held = w if mask is None else w * mask
    peak, peak_column = held.abs().max(1)
    peak_column[peak == 0] = -1
    peak = torch.where(peak > 0, peak, 1.0).bfloat16().double()
    clearance = torch.full_like(peak, math.inf)
    for i in range(columns):
        if mask is None and i % width == 0:
            stop = min(i + width, columns)
            score = w[:, i:stop] ** 2 / diagonal[i:stop] ** 2
            kept[:, i:stop] = select(text, scope, score, i, sparsity)
        wanted = w[:, i].clone()
        if bits:
            wanted = nearest(w[:, i], peak / 127, peak_column == i)
            from_tie = ((w[:, i] * 127 / peak).remainder(1.0) - 0.5).abs()
            clearance = torch.where(kept[:, i], clearance.minimum(from_tie), clearance)
        wanted[~kept[:, i]] = 0.0
        error = (w[:, i] - wanted) / diagonal[i]
        w[:, i:] -= error[:, None] * factor[i, i:]
        w[:, i] = wanted
    return w, kept, clearance


def nearest(values: Tensor, scales: Tensor, largest: Tensor) -> Tensor:
    """The nearest of −127 … 127 times the scale; an end of it for what was the row's largest."""
    grid = scales[:, None] * torch.arange(-127, 128, dtype=torch.float64)
    place = (grid - values[:, None]).abs().argmin(1)
    place = torch.where(largest, torch.where(values >= 0, 254, 0), place)
    return grid.gather(1, place[:, None])[:, 0]


def selection_width(text: str, block_columns: int) -> int:
    """How many columns are decided at once: a group, or as many whole blocks as fit."""
    if ":" in text:
        return int(text.split(":")[1])
    if "x" in text:
        width = math.prod(map(int, text.split("x")[1].replace("@", "/").split("/")))
        return max(1, block_columns // width) * width
    return block_columns


def select(text: str, scope: str | None, score: Tensor, start: int, sparsity: float) -> Tensor:
    """The mask of the columns from `start`: the share that keeps the running total exact."""
    out, width = score.shape

    def share(units_per_column: float) -> int:
        before = patterns.nearest_count(round(start * units_per_column), sparsity)
        return patterns.nearest_count(round((start + width) * units_per_column), sparsity) - before

    if ":" in text or "@" in text:
        return patterns.mask_of(text, scope, score, sparsity)
    if text.startswith("*x"):
        columns, multiple = map(int, f"{text.removeprefix('*x')}/1".split("/")[:2])
        pruned = multiple * share(1 / (columns * multiple))
        return patterns.fewest_columns(score, columns, pruned)
    if "x" in text:
        r, c = map(int, text.split("x"))
        return patterns.block(score, r, c, share((out // r) / c))
    if scope == "row":
        return patterns.per_row(score, share(1))
    return patterns.unstructured(score, share(out))


def relative_error(weight: Tensor, new_weight: Tensor, x: Tensor) -> float:
    """‖(W − Ŵ)X‖² / ‖WX‖², by multiplying the inputs out."""
    w, new, inputs = weight.double(), new_weight.double(), x.double()
    return float((inputs @ (w - new).t()).square().sum() / (inputs @ w.t()).square().sum())
