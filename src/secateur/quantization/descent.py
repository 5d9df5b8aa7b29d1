"""Coordinate descent over the integers and the scales of a rounded matrix.

The layer-wise error of all rows x of X̂ (targets t) is Σ (x − t) H (x − t)ᵀ. With everything else
held, it is a parabola in one weight, and one in the scale s of one group with its integers q:

    w_j ← s · round((x_j − r_j / H_jj) / s)      r = (x − t) H, the residual of the row
    s   ← s − q rᵀ / (q H qᵀ)                    over the group's columns; then the nearest scale

The nearest point of a grid to the vertex of a parabola is the best on that grid, so no step raises
the error. A pass takes the groups from left to right: first the scale, then the integers.

Papers: Behdin et al. 2023, "QuantEase: Optimization-based Quantization for Language Models",
arXiv:2309.01885; Nair and Suggala 2024, "CDQuant: Greedy Coordinate Descent for Accurate LLM
Quantization", arXiv:2406.17542. Deviations: columns are cyclic, scales take part, and the zeros of
a mask are held.
"""

from __future__ import annotations

import torch
from torch import Tensor

from secateur.quantization.sweep_grids import GroupColumns


def descend(
    columns: Tensor,
    grid: GroupColumns,
    target: Tensor,
    kept: Tensor,
    gram: Tensor,
    diagonal: Tensor,
    passes: int,
) -> None:
    """Lower the error of `columns` in place, and change the scales of `grid` with them.

    Args:
        columns: weights on the grid, float32 [in, out].
        grid: their grid; its scales change.
        target: the weights to come near to, float32 [in, out].
        kept: False where a weight stays zero, bool [in, out].
        gram: off the diagonal this is H, float32 [in, in].
        diagonal: the diagonal of H, float32 [in].
        passes: over all columns.
    """
    if not passes:
        return
    shift = (diagonal - gram.diagonal())[:, None]
    wrong = columns - target
    residual = torch.addmm(shift * wrong, gram, wrong)
    del wrong
    for _ in range(passes):
        for group in range(len(grid.scale)):
            span = slice(group * grid.together, (group + 1) * grid.together)
            hessian = gram[span, span].clone()
            hessian.diagonal().copy_(diagonal[span])
            before = columns[span].clone()
            _fit_group(columns[span], grid, group, kept[span], hessian, residual[span])
            change = columns[span] - before
            residual.addmm_(gram[:, span], change)
            residual[span].addcmul_(shift[span], change)


def _fit_group(
    columns: Tensor, grid: GroupColumns, group: int, kept: Tensor, hessian: Tensor, residual: Tensor
) -> None:
    """The scale of one group, then its integers, in place; `residual` [group, out] is read."""
    scale = grid.scale[group]
    codes = columns / scale
    curvature = (codes * (hessian @ codes)).sum(dim=0)
    wanted = scale - (codes * residual).sum(dim=0) / curvature.clamp_min(1e-30)
    usable = (curvature > 0) & (wanted > 0)
    found = torch.where(usable, grid.nearest(wanted.clamp_min(0)), scale)
    scaled = codes.round_().mul_(found)
    residual = torch.addmm(residual, hessian, scaled - columns)
    grid.scale[group] = found
    columns.copy_(scaled)
    moved = torch.empty_like(columns)
    for i, column in enumerate(columns):
        pull = residual[i]
        if i:
            pull.addmv_(moved[:i].t(), hessian[:i, i])
        rounded = grid.rounded(column - pull / hessian[i, i], found).mul_(kept[i])
        torch.sub(rounded, column, out=moved[i])
        column.copy_(rounded)
