"""The grids to which a column sweep rounds: one scale for a row, or one for each group of it.

A sweep holds the weight transposed, [in, out] or a batch of them, and goes from the first column to
the last. Both grids answer the same two calls: `begin` at each step of columns, `round` at each.

Coordinate descent then improves the integers and the scales of a rounded matrix. The layer-wise
error of all rows x of X̂ (targets t) is Σ (x − t) H (x − t)ᵀ. With everything else held, it is a
parabola in one weight, and one in the scale s of one group with its integers q:

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

from dataclasses import dataclass

import torch
from torch import Tensor

from secateur.machine import add_product, add_rows
from secateur.quantization.groups import GroupGrid, Scales
from secateur.quantization.int8 import LARGEST, grid_rows

_ROOM = 2.0
"""By how much a scale may grow beyond the one whose lowest integer is the largest weight before the
sweep."""


@dataclass(frozen=True)
class RowColumns:
    """int8 with one scale for each row, chosen before the sweep.

    Attributes:
        peak: the largest of each row, float32 [..., out]; the scale is this / 127.
        column: where it is, int64 [..., out]; it stays there, as ±peak. -1 in a row of zeros.
    """

    peak: Tensor
    column: Tensor
    together: int = 0

    @staticmethod
    def of(columns: Tensor) -> RowColumns:
        """The grid of weights [..., in, out], zero where pruned."""
        peak, column = columns.abs().max(dim=-2)  # over the inputs: one for each row of the weight
        return RowColumns(grid_rows(peak), column.masked_fill_(peak == 0, -1))

    def begin(self, start: int, columns: Tensor, importance: Tensor) -> None:
        """Nothing is chosen during the sweep."""

    def round(self, column: Tensor, index: int) -> Tensor:
        """A column [..., out], rounded."""
        scale = self.peak / LARGEST
        rounded = (column / scale).round_().clamp_(-LARGEST, LARGEST).mul_(scale)
        # The largest weight of a row becomes exactly ±peak, so that it gives the scale again.
        return torch.where(self.column == index, self.peak.copysign(column), rounded)


class GroupColumns:
    """2, 3 or 4 bits in groups; a scale is chosen when the sweep arrives at its group.

    Args:
        grid: bits and group.
        columns: the weights before the sweep, float32 [..., in, out]. They set the exponents of
            rows.

    Attributes:
        exponent: of the rows of all matrices, int8 [rows].
        scale: the scales, float32 [..., groups, out]; they are on the grid of scales.
    """

    def __init__(self, grid: GroupGrid, columns: Tensor) -> None:
        self.grid = grid
        groups = columns.split(grid.group, dim=-2)
        peaks = torch.stack([group.abs().amax(dim=-2) for group in groups], dim=-1)
        # [rows, groups]: scales whose lowest integer is twice the largest weight. Only their
        # exponents last; each scale is chosen anew when the sweep arrives.
        first = Scales.nearest(peaks.flatten(0, -2) / -grid.lowest * _ROOM)
        self.exponent = first.exponent
        self.scale = first.values.view(peaks.shape).mT.contiguous()

    @property
    def together(self) -> int:
        """The columns of a group."""
        return self.grid.group

    def begin(self, start: int, columns: Tensor, importance: Tensor) -> None:
        """Choose the scale with the least error Σ_j h_j (w_j − s q_j)² in a group.

        Args:
            start: the number of its first column.
            columns: its weights as they are now, float32 [..., together, out]; pruned ones are 0.
            importance: h, of each column, float32 [..., together].
        """
        # The rows of all matrices, one below the other: [rows, together].
        rows, each = columns.mT, importance[..., None, :].expand_as(columns.mT)
        found = self.grid.search(rows.flatten(0, -2), each.flatten(0, -2), self.exponent)
        self.scale[..., start // self.together, :] = found.values.view(rows.shape[:-1])

    def round(self, column: Tensor, index: int) -> Tensor:
        """A column [..., out], rounded."""
        return self.rounded(column, self.scale[..., index // self.together, :])

    def rounded(self, columns: Tensor, scale: Tensor) -> Tensor:
        """Weights, rounded with scales that broadcast to them."""
        grid = self.grid
        return (columns / scale).round_().clamp_(grid.lowest, grid.largest).mul_(scale)

    def nearest(self, scale: Tensor) -> Tensor:
        """The nearest scales of the rows' grids of scales to numbers [..., out]."""
        found = Scales.nearest(scale.reshape(-1, 1), self.exponent)
        return found.values.view(scale.shape)


SweepGrid = RowColumns | GroupColumns
"""The grid of one matrix during a sweep, or of a batch."""


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
        columns: weights on the grid, float32 [..., in, out].
        grid: their grid; its scales change.
        target: the weights to come near to, float32 [..., in, out].
        kept: False where a weight stays zero, bool [..., in, out].
        gram: off the diagonal this is H, float32 [..., in, in].
        diagonal: the diagonal of H, float32 [..., in].
        passes: over all columns.
    """
    if not passes:
        return
    # H = gram + shift on the diagonal, [in, 1]: the gram is not copied to hold the damping.
    shift = (diagonal - gram.diagonal(dim1=-2, dim2=-1))[..., None]
    wrong = columns - target
    residual = add_product(shift * wrong, gram, wrong)  # rᵀ = H (x − t)ᵀ, [..., in, out]
    del wrong
    for _ in range(passes):
        for group in range(grid.scale.shape[-2]):
            span = slice(group * grid.together, (group + 1) * grid.together)
            # [group, group] of H, with the damping on its diagonal.
            hessian = gram[..., span, span].clone()
            hessian.diagonal(dim1=-2, dim2=-1).copy_(diagonal[..., span])
            own, left = columns[..., span, :], residual[..., span, :]
            before = own.clone()
            _fit_group(own, grid, group, kept[..., span, :], hessian, left)
            # What a group changed reaches the residuals of all columns, its own included.
            change = own - before
            add_product(residual, gram[..., span], change)
            left.addcmul_(shift[..., span, :], change)


def _fit_group(
    columns: Tensor, grid: GroupColumns, group: int, kept: Tensor, hessian: Tensor, residual: Tensor
) -> None:
    """The scale of one group, then its integers, in place; `residual` [..., group, out] is read."""
    scale = grid.scale[..., group, :]
    codes = columns / scale[..., None, :]  # q, whole up to rounding
    # q H qᵀ and q rᵀ of every row at once: columns are [..., group, out], so sums go over dim -2.
    curvature = (codes * (hessian @ codes)).sum(dim=-2)
    # The vertex of the parabola in s; the curvature is 0 where all integers are.
    wanted = scale - (codes * residual).sum(dim=-2) / curvature.clamp_min(1e-30)
    # No parabola where all q are 0; and a scale of the other sign would turn the grid around.
    usable = (curvature > 0) & (wanted * scale > 0)
    found = torch.where(usable, grid.nearest(wanted), scale)
    scaled = codes.round_().mul_(found[..., None, :])  # the same integers with the new scale
    # A copy: `descend` corrects its own residual by all that the group changes.
    residual = add_product(residual.clone(), hessian, scaled - columns)
    grid.scale[..., group, :] = found
    columns.copy_(scaled)
    moved = torch.empty_like(columns)  # by how much each column of the group changed
    for i, (column, pull, change) in enumerate(
        zip(*(x.unbind(-2) for x in (columns, residual, moved)), strict=True)
    ):
        if i:  # the columns before it have moved since the residual was computed
            add_rows(pull, hessian[..., :i, i], moved[..., :i, :])
        # The vertex of the parabola in w_i, rounded; a pruned weight stays 0.
        vertex = column - pull / hessian[..., i, i, None]
        rounded = grid.rounded(vertex, found).mul_(kept[..., i, :])
        torch.sub(rounded, column, out=change)
        column.copy_(rounded)
