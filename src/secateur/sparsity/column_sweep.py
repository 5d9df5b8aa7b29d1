"""The column sweep of optimal brain surgery: prune and round, and let later columns make up for it.

With UᵀU = H⁻¹ upper triangular, for each column i from left to right

    Q_:i = grid(W_:i) where kept, 0 where pruned;    e = (W_:i − Q_:i) / U_ii
    W_:j ← W_:j − e · U_ij

for all j > i. Without a grid Q_:i = W_:i where kept. All matrices of a batch are swept together.

Rounding of a pruned linear layer, whose zeros are held, has three steps:

    X* ← argmin tr((X − W) H (X − W)ᵀ),   X = 0 where pruned       conjugate gradients on the mask
    sweep X* column by column: scales, integers; later columns make up for earlier ones
    coordinate descent over scales and integers

The error of any X with these zeros is that of X* plus tr((X − X*) H (X − X*)ᵀ). So the sweep can
start from X*, where pruning is made up for already, and only rounding is left to make up for.

A kept weight may round to 0. On a grid of groups it is stored as −0, and a pruned one as +0: so a
training that begins from the rounded weights holds only what was pruned (`kept_weights`).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from secateur.machine import add_product, add_rows
from secateur.quantization.blocks import BlockGrid
from secateur.quantization.groups import GroupGrid
from secateur.quantization.sweep_grids import (
    BlockColumns,
    GroupColumns,
    RowColumns,
    SweepGrid,
    descend,
)
from secateur.sparsity.patterns import Pattern
from secateur.types import Mask, Weight

_BLOCK_COLUMNS = 128
"""Columns in a lazy block."""

# Columns swept one by one before one matmul applies their effect to the others. Measured on [1536,
# 576] and [576, 1536]: 16 to 64 differ by 3 %, 4 and 128 are 10 % slower.
_STEP_COLUMNS = 32


def sweep(
    columns: Tensor,
    kept: Tensor,
    factor: Tensor,
    block_columns: int = _BLOCK_COLUMNS,
    choice: Choice | None = None,
    grid: SweepGrid | None = None,
) -> None:
    """Solve `columns` in place, lazy block by lazy block.

    Args:
        columns: the weight transposed, so that every column is contiguous, float32 [..., in, out].
        kept: the mask transposed, bool [..., in, out]; filled if there is a choice.
        factor: U, float32 [..., in, in].
        block_columns: columns in a lazy block; rounded down to whole groups.
        choice: selects the mask; None holds `kept`.
        grid: rounds the kept weights; None keeps them as they are.
    """
    # No lazy block may cut an N:M group, or a group that shares a scale.
    together = math.lcm(
        choice.pattern.columns_together if choice else 1, (grid.together if grid else 0) or 1
    )
    # Rounded down to what must stay together, and never less than one of it.
    width = max(block_columns // together, 1) * together
    for start in range(0, columns.shape[-2], width):
        block = columns[..., start : start + width, :]
        stop = start + block.shape[-2]
        block_factor = factor[..., start:stop, start:stop]
        block_kept = kept[..., start:stop, :]
        if choice and not choice.by_group:
            diagonal = block_factor.diagonal(dim1=-2, dim2=-1)
            block_kept.copy_(choice.of_block(block, diagonal, start))
        errors = _sweep_block(block, block_kept, block_factor, choice, grid, start)
        # All columns to the right at once: [in − stop, width] x [width, out].
        add_product(columns[..., stop:, :], factor[..., start:stop, stop:].mT, errors, alpha=-1)


class Choice(NamedTuple):
    """Selects the mask from the weights as they are when the sweep arrives."""

    pattern: Pattern
    sparsity: float

    @property
    def by_group(self) -> bool:
        """Whether each group of columns is decided on its own (N:M), not the lazy block."""
        return self.pattern.scope == "group"

    def of_group(self, group: Tensor, diagonal: Tensor) -> Tensor:
        """Kept weights [..., M, out] of one N:M group of columns."""
        return self.pattern.mask(_obs_score(group, diagonal), self.sparsity).mT

    def of_block(self, block: Tensor, diagonal: Tensor, start: int) -> Tensor:
        """Kept weights [..., columns, out] of the lazy block that begins at column `start`.

        Its share makes the count exact up to its last column, so rounding never accumulates over
        the blocks.
        """
        *_, width, rows = block.shape
        # As many as the columns up to here should have lost, less those lost before this block.
        before = self.pattern.pruned((rows, start), self.sparsity)
        share = self.pattern.pruned((rows, start + width), self.sparsity) - before
        every = self.pattern.pruned((rows, width), 1.0)  # also those of rows in other processes
        if share == every:  # a pattern holds no sparsity of 1
            return torch.zeros_like(block, dtype=torch.bool)
        return self.pattern.mask(_obs_score(block, diagonal), share / every).mT


def _obs_score(columns: Tensor, diagonal: Tensor) -> Tensor:
    """W_ij² / U_jj², float32 [..., out, columns], of columns [..., columns, out]."""
    # Divided first: the square of a small U_jj could underflow.
    return (columns / diagonal[..., None]).square_().mT


def _sweep_block(
    block: Tensor,
    kept: Tensor,
    factor: Tensor,
    choice: Choice | None,
    grid: SweepGrid | None,
    first: int,
) -> Tensor:
    """Solve one lazy block [..., columns, out] in place; return the errors e of the same shape.

    `first` is the number of its first column in the matrix.

    Left-looking: a column receives the errors of all columns before it when its turn comes. So
    every weight is read and written once, not once per column to its left.
    """
    errors = torch.empty_like(block)
    # An N:M group is a step, so that it is chosen when all errors from its left have arrived.
    by_group = choice is not None and choice.by_group
    step = choice.pattern.columns_together if choice and by_group else _STEP_COLUMNS
    scaled = grid.together if grid else 0
    if grid and scaled and not by_group:  # with N:M, M divides the group
        step = grid.step
    diagonal, width = factor.diagonal(dim1=-2, dim2=-1), block.shape[-2]
    for start in range(0, width, step):
        span = slice(start, min(start + step, width))
        current, before = block[..., span, :], errors[..., :start, :]
        if start:
            add_product(current, factor[..., :start, span].mT, before, alpha=-1)
        if grid and scaled and start % scaled == 0:
            group = slice(start, start + scaled)
            # The scale needs all columns of its group as they are now; those beyond this step have
            # not received the errors before it, so a copy receives them.
            ahead = block[..., group, :].clone()
            later = ahead[..., step:, :]
            add_product(later, factor[..., :start, group][..., step:].mT, before, alpha=-1)
            own, allowed = diagonal[..., group], kept[..., group, :]
            if choice and by_group:
                allowed = choice.of_group(ahead, own)
            # What a column adds to the error is e² = (w − q)² / U_jj².
            grid.begin(first + start, ahead.mul_(allowed), own**-2)
        if choice and by_group:
            kept[..., span, :] = choice.of_group(current, diagonal[..., span])
        pruned = ~kept[..., span, :]
        # e = W_:i · this, 0 where kept: no division inside.
        scale = pruned / diagonal[..., span, None]
        step_errors, step_factor = errors[..., span, :], factor[..., span, span]
        for i, (column, column_scale, error) in enumerate(
            zip(*(x.unbind(-2) for x in (current, scale, step_errors)), strict=True)
        ):
            if i:  # the errors of the columns of this step, [i] x [i, out]
                add_rows(column, step_factor[..., :i, i], step_errors[..., :i, :], alpha=-1)
            if grid is None:
                torch.mul(column, column_scale, out=error)
                continue
            rounded = grid.round(column, first + start + i) * kept[..., start + i, :]
            torch.sub(column, rounded, out=error).div_(diagonal[..., start + i, None])
            column.copy_(rounded)
        # Once for all columns of the step: a column is read no more when its error is known.
        current.masked_fill_(pruned, 0.0)
    return errors


def sweep_grid(
    columns: Tensor, bits: int | str, grid: GroupGrid | BlockGrid | None
) -> SweepGrid | None:
    """The grid for a sweep over weights [..., in, out], zero where pruned; None for 0 bits."""
    if isinstance(grid, BlockGrid):
        return BlockColumns(grid, columns)
    if grid is not None:
        return GroupColumns(grid, columns)
    return RowColumns.of(columns) if bits else None


def round_on_mask(
    start: Tensor,
    grid: SweepGrid | None,
    target: Tensor,
    kept: Tensor,
    gram: Tensor,
    diagonal: Tensor,
    factor: Tensor,
    passes: int,
) -> Tensor | None:
    """Round `start`, which is X*, in place; its zeros are held.

    Args:
        start: float32 [..., in, out].
        grid: its grid.
        target: W transposed, float32 [..., in, out].
        kept: the mask transposed, bool [..., in, out].
        gram: H off its diagonal, float32 [..., in, in].
        diagonal: that of H, float32 [..., in].
        factor: U with UᵀU = H⁻¹, float32 [..., in, in].
        passes: of coordinate descent; for a grid of groups.

    Returns:
        The blocks of a grid of llama.cpp, uint8 [..., out, bytes of a row]; None for other grids.
    """
    # X* is exact for its mask, so the errors of pruning are made up for: only rounding errors flow.
    sweep(start, kept, factor, grid=grid)
    if grid is None or isinstance(grid, RowColumns):
        return None
    # The descent aims at W, not at X*: both have the same minimum on this mask.
    descend(start, grid, target, kept, gram, diagonal, passes)
    packed = None
    if isinstance(grid, BlockColumns):
        blocks = grid.blocks(start)
        start.copy_(blocks.values.mT)
        packed = blocks.encode()
    mark_kept(start, kept)
    return packed


def mark_kept(weight: Weight, kept: Mask) -> Weight:
    """Make the zeros of a rounded weight −0 where it is kept and +0 where it is pruned, in place.

    Example:
        >>> import torch
        >>> from secateur.sparsity.column_sweep import kept_weights, mark_kept
        >>> weight = torch.tensor([[0.5, 0.0, 0.0]])
        >>> rounded = mark_kept(weight, torch.tensor([[True, True, False]]))
        >>> kept_weights(rounded.bfloat16())
        tensor([[ True,  True, False]])
    """
    # 0 == −0, so the first fill makes every zero +0, wherever its sign came from.
    return weight.masked_fill_(weight == 0, 0.0).masked_fill_((weight == 0) & kept, -0.0)


def kept_weights(weight: Weight) -> Mask:
    """The mask of a weight from `mark_kept`: its nonzero values and its −0."""
    return (weight != 0) | torch.signbit(weight)
