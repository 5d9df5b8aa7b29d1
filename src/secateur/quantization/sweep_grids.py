"""The grids to which a column sweep rounds: a scale for each row or group, or the blocks of ggml.

A sweep holds the weight transposed, [in, out] or a batch of them, and goes from the first column to
the last. All grids answer the same two calls: `begin` at each group or block, `round` at each
column.

Coordinate descent then improves the integers and the scales of a rounded matrix. The layer-wise
error of all rows x of X̂ (targets t) is Σ (x − t) H (x − t)ᵀ. With everything else held, it is a
parabola in one weight, and one in the scale s of one group with its integers q:

    w_j ← s · round((x_j − r_j / H_jj) / s)      r = (x − t) H, the residual of the row
    s   ← s − q rᵀ / (q H qᵀ)                    over the group's columns; then the nearest scale

The nearest point of a grid to the vertex of a parabola is the best on that grid, so no step raises
the error. A pass takes the groups from left to right: first the scale, then the integers. A block
of ggml has integers for scale and minimum of each sub-block: the error is a parabola in both. Their
neighbours are tried with codes of their own, and the float16 numbers of the block come last.

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
from secateur.quantization.block_search import Found, Parabola, search
from secateur.quantization.block_types import inverse
from secateur.quantization.blocks import BlockGrid, Blocks
from secateur.quantization.groups import GroupGrid, Scales
from secateur.quantization.int8 import LARGEST, grid_rows

_ROOM = 2.0
"""By how much a scale may grow beyond the one whose lowest integer is the largest weight before the
sweep."""


_MOVES = ((0, 0), (1, 0), (-1, 0), (0, 1), (0, -1), (1, 1), (-1, -1))
"""The integers s and m whose codes are tried, beside the best for the codes there are."""

_SCALE_MOVES = ((0, 0), (1, 0), (-1, 0), (2, 0), (-2, 0))
"""The same where there are no minima."""


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
    step: int = 0

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
        together: the columns of a group.
        step: the columns that are swept one by one before others follow.
        exponent: of the rows of all matrices, int8 [rows].
        scale: the scales, float32 [..., groups, out]; they are on the grid of scales.
    """

    def __init__(self, grid: GroupGrid, columns: Tensor) -> None:
        self.grid, self.together, self.step = grid, grid.group, grid.group
        groups = columns.split(grid.group, dim=-2)
        peaks = torch.stack([group.abs().amax(dim=-2) for group in groups], dim=-1)
        # [rows, groups]: scales whose lowest integer is twice the largest weight. Only their
        # exponents last; each scale is chosen anew when the sweep arrives.
        first = Scales.nearest(peaks.flatten(0, -2) / -grid.lowest * _ROOM)
        self.exponent = first.exponent
        self.scale = first.values.view(peaks.shape).mT.contiguous()

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

    def fit(
        self, columns: Tensor, group: int, kept: Tensor, hessian: Tensor, residual: Tensor
    ) -> None:
        """The scale of one group, then its integers, in place.

        Args:
            columns: the weights of the group, float32 [..., together, out].
            group: its number.
            kept: False where a weight stays zero, bool, like `columns`.
            hessian: H of these columns, float32 [..., together, together].
            residual: rᵀ of these columns, float32 [..., together, out]; it is read.
        """
        scale = self.scale[..., group, :]
        codes = columns / scale[..., None, :]  # q, whole up to rounding
        # q H qᵀ and q rᵀ of every row at once: columns are [..., group, out], so sums go over -2.
        curvature = (codes * (hessian @ codes)).sum(dim=-2)
        # The vertex of the parabola in s; the curvature is 0 where all integers are.
        wanted = scale - (codes * residual).sum(dim=-2) / curvature.clamp_min(1e-30)
        # No parabola where all q are 0; and a scale of the other sign would turn the grid around.
        usable = (curvature > 0) & (wanted * scale > 0)
        found = torch.where(usable, self.nearest(wanted), scale)
        scaled = codes.round_().mul_(found[..., None, :])  # the same integers with the new scale
        # A copy: `descend` corrects its own residual by all that the group changes.
        residual = add_product(residual.clone(), hessian, scaled - columns)
        self.scale[..., group, :] = found
        columns.copy_(scaled)
        _descend_columns(columns, kept, hessian, residual, self, (found,))


class BlockColumns:
    """A type of ggml: d, d′, s and m are chosen when the sweep arrives at their block.

    Args:
        grid: the type.
        columns: the weights before the sweep, float32 [..., in, out]; only their shape counts.

    Attributes:
        together: the columns of a block.
        step: the columns of a sub-block.
        d, d_min: float32 [..., blocks, out], exact in float16.
        scales, minima: s and m, whole float32 [..., sub-blocks, out].

    Raises:
        ShapeError: a row has no whole number of blocks.
    """

    def __init__(self, grid: BlockGrid, columns: Tensor) -> None:
        self.grid, self.table, self.together, self.step = grid, grid.table, grid.block, grid.sub
        *batch, inputs, out = columns.shape
        grid.row_bytes(inputs)  # refuses a block that is not whole
        self.subs = self.table.subs
        self.d = columns.new_zeros(*batch, inputs // grid.block, out)
        self.scales = columns.new_zeros(*batch, inputs // grid.sub, out)
        self.d_min, self.minima = torch.zeros_like(self.d), torch.zeros_like(self.scales)

    def begin(self, start: int, columns: Tensor, importance: Tensor) -> None:
        """Choose d, d′, s and m with the least error Σ_j h_j (w_j − ŵ_j)² in a block.

        Args:
            start: the number of its first column.
            columns: its weights as they are now, float32 [..., together, out]; pruned ones are 0.
            importance: h, of each column, float32 [..., together].
        """
        rows = columns.mT
        each = importance[..., None, :].expand_as(rows)
        block, shape = start // self.grid.block, (-1, self.subs, self.grid.sub)
        found = search(self.table, rows.reshape(shape), each.reshape(shape))
        for own, every in ((self.d, found.d), (self.d_min, found.d_min)):
            own[..., block, :] = every.view(rows.shape[:-1])
        for own, every in ((self.scales, found.scales), (self.minima, found.minima)):
            own[..., self._subs(block), :] = every.view(*rows.shape[:-1], -1).mT

    def _subs(self, block: int) -> slice:
        """The sub-blocks of a block."""
        return slice(block * self.subs, (block + 1) * self.subs)

    def round(self, column: Tensor, index: int) -> Tensor:
        """A column [..., out], rounded."""
        return self.rounded(column, *self._of(index // self.grid.sub))

    def _of(self, sub: int) -> tuple[Tensor, Tensor]:
        """The scale d · s and the minimum d′ · m of a sub-block, [..., out]."""
        scales, minima = self.scales[..., sub, :], self.minima[..., sub, :]
        block = sub // self.subs
        return self.d[..., block, :] * scales, self.d_min[..., block, :] * minima

    def rounded(self, columns: Tensor, scale: Tensor, minimum: Tensor) -> Tensor:
        """Weights, rounded with scales and minima that broadcast to them."""
        level = self.table.nearest(columns, scale, minimum)
        return self.table.weights(level, scale, minimum)

    def blocks(self, columns: Tensor) -> Blocks:
        """The blocks [..., out, in] of weights [..., in, out] that are on this grid."""
        found = (x.mT for x in (self.d, self.scales, self.d_min, self.minima))
        return Blocks.of(self.grid, Found(*found), columns.mT)

    def fit(
        self, columns: Tensor, block: int, kept: Tensor, hessian: Tensor, residual: Tensor
    ) -> None:
        """The integers and codes of each sub-block in turn, then d and d′, all in place.

        Args:
            columns: the weights of one block, float32 [..., together, out].
            block: its number.
            kept: bool, like `columns`; all True where the type has no exact zero.
            hessian: H of these columns, float32 [..., together, together].
            residual: rᵀ of these columns, float32 [..., together, out]; it is read.
        """
        residual, sub = residual.clone(), self.grid.sub
        for number in range(self.subs):
            span = slice(number * sub, (number + 1) * sub)
            own, left = columns[..., span, :], residual[..., span, :]
            before = own.clone()
            held, here = kept[..., span, :], hessian[..., span, span]
            if not self.table.has_integers:
                _descend_columns(own, held, here, left.clone(), self, self._of(block))
            else:
                self._fit_sub(own, block * self.subs + number, held, here, left)
            add_product(residual, hessian[..., span], own - before)
        self._fit_numbers(columns, block, kept, hessian, residual)

    def _fit_sub(
        self, columns: Tensor, sub: int, kept: Tensor, hessian: Tensor, residual: Tensor
    ) -> None:
        """The integers of a sub-block, its codes held; then codes for these integers and for their
        neighbours, of which the best stay.
        """
        before = columns.clone()
        self._fit_integers(columns, sub, kept, hessian, residual)
        pull = add_product(residual.clone(), hessian, columns - before)
        moves = _MOVES if self.table.has_minima else _SCALE_MOVES
        s, m = self.scales[..., sub, :], self.minima[..., sub, :]
        # Each try has columns of its own, side by side: [..., tries · out].
        tried_s = torch.stack([s + a for a, _ in moves], dim=-2).clamp_(*self.table.scales)
        tried_m = torch.stack([m + b for _, b in moves], dim=-2).clamp_(*self.table.minima)
        numbers = (x[..., sub // self.subs, None, :] for x in (self.d, self.d_min))
        scale, minimum = (
            (number * tried).flatten(-2)
            for number, tried in zip(numbers, (tried_s, tried_m), strict=True)
        )
        wide, before, kept, residual, pull = (
            torch.cat([x] * len(moves), dim=-1) for x in (columns, before, kept, residual, pull)
        )
        _descend_columns(wide, kept, hessian, pull, self, (scale, minimum))
        change = wide - before
        gain = (change * (2 * residual + hessian @ change)).sum(dim=-2).view(tried_s.shape)
        s.copy_(_best(tried_s, gain))
        m.copy_(_best(tried_m, gain))
        columns.copy_(_best(wide.unflatten(-1, (len(moves), -1)), gain[..., None, :, :]))

    def _fit_integers(
        self, columns: Tensor, sub: int, kept: Tensor, hessian: Tensor, residual: Tensor
    ) -> None:
        """The integers s and m of a sub-block, its codes held."""
        scale, minimum = (x[..., None, :] for x in self._of(sub))
        level = self.table.nearest(columns, scale, minimum)
        ones = torch.ones_like(level) if self.table.has_minima else None
        error = _parabola(level * kept, ones, hessian, residual)
        s, m = self.scales[..., sub, :], self.minima[..., sub, :]
        d, d_min = (x[..., sub // self.subs, :] for x in (self.d, self.d_min))
        alone = s + error.first() * inverse(d)
        tried = [(s, m), (alone.round_().clamp_(*self.table.scales), m)]
        if self.table.has_minima:
            # The integers s on both sides of the vertex, and the best m for each.
            vertex = s + error.vertex()[0] * inverse(d)
            for near in (vertex.floor(), vertex.ceil()):
                new = near.clamp_(*self.table.scales)
                wanted = m + error.second(d * (new - s)) * inverse(d_min)
                tried.append((new, wanted.round_().clamp_(*self.table.minima)))
        tried_s, tried_m = (torch.stack(each, dim=-2) for each in zip(*tried, strict=True))
        # A parabola has a number for each row, and the tries come before the rows.
        error = Parabola(*(part[..., None, :] for part in error))
        change = error.change(
            d[..., None, :] * (tried_s - s[..., None, :]),
            d_min[..., None, :] * (tried_m - m[..., None, :]),
        )
        s.copy_(_best(tried_s, change))
        m.copy_(_best(tried_m, change))
        scale, minimum = (x[..., None, :] for x in self._of(sub))
        columns.copy_(self.table.weights(level, scale, minimum).mul_(kept))

    def _fit_numbers(
        self, columns: Tensor, block: int, kept: Tensor, hessian: Tensor, residual: Tensor
    ) -> None:
        """The float16 numbers d and d′ of a block, all integers and codes held."""
        s, m = (
            x[..., self._subs(block), :].repeat_interleave(self.grid.sub, dim=-2)
            for x in (self.scales, self.minima)
        )
        d, d_min = self.d[..., block, :], self.d_min[..., block, :]
        level = self.table.nearest(columns, d[..., None, :] * s, d_min[..., None, :] * m)
        error = _parabola(level * s * kept, m if self.table.has_minima else None, hessian, residual)
        grown = error.vertex()
        new, other = ((x + more).half().float() for x, more in zip((d, d_min), grown, strict=True))
        # Of values beyond float16 the error is no number, and not below 0.
        better = error.change(new - d, other - d_min) < 0
        d.copy_(torch.where(better, new, d))
        d_min.copy_(torch.where(better, other, d_min))
        scale, minimum = d[..., None, :] * s, d_min[..., None, :] * m
        columns.copy_(self.table.weights(level, scale, minimum).mul_(kept))


def _best(tries: Tensor, change: Tensor) -> Tensor:
    """Of tries [..., tries, out] those with the least change of the error, of equal ones the first.

    Args:
        tries: any numbers.
        change: with as many dimensions; 1 where it is the same for all.
    """
    best = change.argmin(dim=-2, keepdim=True)
    return tries.gather(-2, best.expand(*tries.shape[:-2], 1, -1)).squeeze(-2)


def _parabola(u: Tensor, v: Tensor | None, hessian: Tensor, residual: Tensor) -> Parabola:
    """The error along columns u and v [..., n, out]; v is None where there is no minimum."""

    def products(left: Tensor, right: Tensor) -> Tensor:
        return (left * right).sum(dim=-2)

    image = hessian @ u
    uu, ur = products(u, image), products(u, residual)
    if v is None:
        none = torch.zeros_like(uu)
        return Parabola(uu, none, none, ur, none)
    return Parabola(uu, products(v, image), products(v, hessian @ v), ur, products(v, residual))


SweepGrid = RowColumns | GroupColumns | BlockColumns
"""The grid of one matrix during a sweep, or of a batch."""


def descend(
    columns: Tensor,
    grid: GroupColumns | BlockColumns,
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
        for group in range(-(-columns.shape[-2] // grid.together)):
            span = slice(group * grid.together, (group + 1) * grid.together)
            # [group, group] of H, with the damping on its diagonal.
            hessian = gram[..., span, span].clone()
            hessian.diagonal(dim1=-2, dim2=-1).copy_(diagonal[..., span])
            own, left = columns[..., span, :], residual[..., span, :]
            before = own.clone()
            grid.fit(own, group, kept[..., span, :], hessian, left)
            # What a group changed reaches the residuals of all columns, its own included.
            change = own - before
            add_product(residual, gram[..., span], change)
            left.addcmul_(shift[..., span, :], change)


def _descend_columns(
    columns: Tensor,
    kept: Tensor,
    hessian: Tensor,
    residual: Tensor,
    grid: GroupColumns | BlockColumns,
    scales: tuple[Tensor, ...],
) -> None:
    """The codes of some columns with given scales, one column after the other, in place."""
    moved = torch.empty_like(columns)  # by how much each column of the group changed
    for i, (column, pull, change) in enumerate(
        zip(*(x.unbind(-2) for x in (columns, residual, moved)), strict=True)
    ):
        if i:  # the columns before it have moved since the residual was computed
            add_rows(pull, hessian[..., :i, i], moved[..., :i, :])
        # The vertex of the parabola in w_i, rounded; a pruned weight stays 0.
        vertex = column - pull / hessian[..., i, i, None]
        new = grid.rounded(vertex, *scales).mul_(kept[..., i, :])
        torch.sub(new, column, out=change)
        column.copy_(new)
