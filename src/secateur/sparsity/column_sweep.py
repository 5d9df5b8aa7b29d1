"""The column sweep of optimal brain surgery: prune and round, and let later columns make up for it.

With UᵀU = H⁻¹ upper triangular, for each column i from left to right

    Q_:i = grid(W_:i) where kept, 0 where pruned;    e = (W_:i − Q_:i) / U_ii
    W_:j ← W_:j − e · U_ij

for all j > i. Without a grid Q_:i = W_:i where kept.

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
from dataclasses import dataclass

import torch
from torch import Tensor

from secateur.errors import PatternError, RecipeError
from secateur.quantization.groups import BITS, GROUPS, GroupGrid
from secateur.quantization.sweep_grids import GroupColumns, RowColumns, SweepGrid, descend
from secateur.sparsity.patterns import Pattern
from secateur.types import Mask, Weight

BLOCK_COLUMNS = 128
"""Columns in a lazy block."""

# Columns swept one by one before one matmul applies their effect to the others. Measured on [1536,
# 576] and [576, 1536]: 16 to 64 differ by 3 %, 4 and 128 are 10 % slower.
_STEP_COLUMNS = 32


def sweep(
    columns: Tensor,
    kept: Tensor,
    factor: Tensor,
    block_columns: int = BLOCK_COLUMNS,
    choice: Choice | None = None,
    grid: SweepGrid | None = None,
) -> None:
    """Solve `columns` in place, lazy block by lazy block.

    Args:
        columns: the weight transposed, so that every column is contiguous, float32 [in, out].
        kept: the mask transposed, bool [in, out]; filled if there is a choice.
        factor: U, float32 [in, in].
        block_columns: columns in a lazy block; rounded down to whole groups.
        choice: selects the mask; None holds `kept`.
        grid: rounds the kept weights; None keeps them as they are.
    """
    together = math.lcm(
        choice.pattern.columns_together if choice else 1, (grid.together if grid else 0) or 1
    )
    width = max(block_columns // together, 1) * together
    for start in range(0, len(columns), width):
        block = columns[start : start + width]
        stop = start + len(block)
        block_factor = factor[start:stop, start:stop]
        block_kept = kept[start:stop]
        if choice and not choice.by_group:
            block_kept.copy_(choice.of_block(block, block_factor.diagonal(), start))
        errors = _sweep_block(block, block_kept, block_factor, choice, grid, start)
        columns[stop:].addmm_(factor[start:stop, stop:].t(), errors, alpha=-1)


@dataclass(frozen=True)
class Choice:
    """Selects the mask from the weights as they are when the sweep arrives."""

    pattern: Pattern
    sparsity: float

    @property
    def by_group(self) -> bool:
        """Whether each group of columns is decided on its own (N:M), not the lazy block."""
        return self.pattern.scope == "group"

    def of_group(self, group: Tensor, diagonal: Tensor) -> Tensor:
        """Kept weights [M, out] of one N:M group of columns."""
        return self.pattern.mask(_obs_score(group, diagonal), self.sparsity).t()

    def of_block(self, block: Tensor, diagonal: Tensor, start: int) -> Tensor:
        """Kept weights [columns, out] of the lazy block that begins at column `start`.

        Its share makes the count exact up to its last column, so rounding never accumulates over
        the blocks.
        """
        width, rows = block.shape
        before = self.pattern.pruned((rows, start), self.sparsity)
        share = self.pattern.pruned((rows, start + width), self.sparsity) - before
        if share == block.numel():  # a pattern holds no sparsity of 1
            return torch.zeros_like(block, dtype=torch.bool)
        return self.pattern.mask(_obs_score(block, diagonal), share / block.numel()).t()


def _obs_score(columns: Tensor, diagonal: Tensor) -> Tensor:
    """W_ij² / U_jj², float32 [out, columns], of columns [columns, out]."""
    return (columns / diagonal[:, None]).square_().t()


def _sweep_block(
    block: Tensor,
    kept: Tensor,
    factor: Tensor,
    choice: Choice | None,
    grid: SweepGrid | None,
    first: int,
) -> Tensor:
    """Solve one lazy block [columns, out] in place; return the errors e [columns, out].

    `first` is the number of its first column in the matrix.

    Left-looking: a column receives the errors of all columns before it when its turn comes. So
    every weight is read and written once, not once per column to its left.
    """
    errors = torch.empty_like(block)
    by_group = choice is not None and choice.by_group
    step = choice.pattern.columns_together if choice and by_group else _STEP_COLUMNS
    scaled = grid.together if grid else 0
    if scaled and not by_group:
        step = scaled
    diagonal = factor.diagonal()
    for start in range(0, len(block), step):
        span = slice(start, min(start + step, len(block)))
        current = block[span]
        if start:
            current.addmm_(factor[:start, span].t(), errors[:start], alpha=-1)
        if grid and scaled and start % scaled == 0:
            group = slice(start, start + scaled)
            ahead = block[group].clone()
            ahead[step:].addmm_(factor[:start, group][:, step:].t(), errors[:start], alpha=-1)
            allowed = (
                choice.of_group(ahead, diagonal[group]) if choice and by_group else kept[group]
            )
            grid.begin(first + start, ahead.mul_(allowed), diagonal[group] ** -2)
        if choice and by_group:
            kept[span] = choice.of_group(current, diagonal[span])
        pruned = ~kept[span]
        scale = pruned / diagonal[span, None]
        step_errors, step_factor = errors[span], factor[span, span]
        for i, (column, column_scale, error) in enumerate(
            zip(current, scale, step_errors, strict=True)
        ):
            if i:
                column.addmv_(step_errors[:i].t(), step_factor[:i, i], alpha=-1)
            if grid is None:
                torch.mul(column, column_scale, out=error)
                continue
            rounded = grid.round(column, first + start + i) * kept[start + i]
            torch.sub(column, rounded, out=error).div_(diagonal[start + i])
            column.copy_(rounded)
        current.masked_fill_(pruned, 0.0)
    return errors


@dataclass(frozen=True)
class Rounding:
    """How a solver rounds.

    Args:
        bits: 2, 3 or 4 in groups, 8 with one scale for each row, or 0 not to round.
        group: 32, 64 or 128 weights of a row with one scale; for 2 to 4 bits.
        descent: passes of coordinate descent after the sweep; for 2 to 4 bits.

    Raises:
        RecipeError: a number is out of range.
    """

    bits: int
    group: int
    descent: int

    def __post_init__(self) -> None:
        if self.bits not in (0, *BITS, 8):
            raise RecipeError(f"bits is {self.bits}", remedy="give 2, 3, 4 or 8, or 0 not to round")
        if self.group not in GROUPS:
            raise RecipeError(
                f"group is {self.group}", remedy=f"give {', '.join(map(str, GROUPS))}"
            )
        if self.descent < 0:
            raise RecipeError(f"descent is {self.descent}", remedy="give 0 or more passes")

    @property
    def group_grid(self) -> GroupGrid | None:
        """The grid, if several weights of a row share a scale, not all of them."""
        return GroupGrid(self.bits, self.group) if self.bits in BITS else None

    def check(self, pattern: Pattern) -> None:
        """Refuse a pattern whose groups of columns lie across those that share a scale.

        Raises:
            PatternError: it is such a pattern.
        """
        if self.group_grid and pattern.scope == "group" and self.group % pattern.columns_together:
            raise PatternError(
                f"groups of {pattern.columns_together} columns do not divide the {self.group} "
                "that share a scale",
                remedy="choose another pattern, or prune first and round afterwards",
            )

    def grid(self, columns: Tensor) -> GroupColumns | RowColumns | None:
        """The grid for a sweep over weights [in, out], zero where pruned."""
        if self.group_grid:
            return GroupColumns(self.group_grid, columns)
        return RowColumns.of(columns) if self.bits else None

    def hold(
        self,
        start: Tensor,
        target: Tensor,
        kept: Tensor,
        gram: Tensor,
        diagonal: Tensor,
        factor: Tensor,
    ) -> None:
        """Round `start`, which is X*, in place; its zeros are held.

        Args:
            start: float32 [in, out].
            target: W transposed, float32 [in, out].
            kept: the mask transposed, bool [in, out].
            gram: H off its diagonal, float32 [in, in].
            diagonal: that of H, float32 [in].
            factor: U with UᵀU = H⁻¹, float32 [in, in].
        """
        grid = self.grid(start)
        sweep(start, kept, factor, grid=grid)
        if isinstance(grid, GroupColumns):
            descend(start, grid, target, kept, gram, diagonal, self.descent)
            mark_kept(start, kept)


def mark_kept(weight: Weight, kept: Mask) -> None:
    """Make the zeros of a rounded weight −0 where it is kept and +0 where it is pruned, in place.

    Example:
        >>> import torch
        >>> from secateur.sparsity.column_sweep import kept_weights, mark_kept
        >>> weight = torch.tensor([[0.5, 0.0, 0.0]])
        >>> mark_kept(weight, torch.tensor([[True, True, False]]))
        >>> kept_weights(weight.bfloat16())
        tensor([[ True,  True, False]])
    """
    weight.masked_fill_(weight == 0, 0.0).masked_fill_((weight == 0) & kept, -0.0)


def kept_weights(weight: Weight) -> Mask:
    """The mask of a weight from `mark_kept`: its nonzero values and its −0."""
    return (weight != 0) | torch.signbit(weight)
