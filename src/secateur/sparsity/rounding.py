"""Rounds the kept weights of a linear to a grid of few bits; the zeros of its mask are held.

    X* ← argmin tr((X − W) H (X − W)ᵀ),   X = 0 where pruned       conjugate gradients on the mask
    sweep X* column by column: scales, integers; later columns make up for earlier ones
    coordinate descent over scales and integers

The error of any X with these zeros is that of X* plus tr((X − X*) H (X − X*)ᵀ). So the sweep can
start from X*, where pruning is made up for already, and only rounding is left to make up for.

A kept weight may round to 0. On a grid of groups it is stored as −0, and a pruned one as +0: so a
training that begins from the rounded weights holds only what was pruned (`kept_weights`).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from secateur.errors import PatternError, RecipeError
from secateur.quantization.descent import descend
from secateur.quantization.groups import BITS, GROUPS, GroupGrid
from secateur.quantization.sweep_grids import GroupColumns, RowColumns
from secateur.sparsity.column_sweep import sweep
from secateur.sparsity.patterns import Pattern
from secateur.types import Mask, Weight


@dataclass(frozen=True)
class Rounding:
    """How a solver rounds.

    Args:
        bits: 3 or 4 in groups, 8 with one scale for each row, or 0 not to round.
        group: 32, 64 or 128 weights of a row with one scale; for 3 and 4 bits.
        descent: passes of coordinate descent after the sweep; for 3 and 4 bits.

    Raises:
        RecipeError: a number is out of range.
    """

    bits: int
    group: int
    descent: int

    def __post_init__(self) -> None:
        if self.bits not in (0, *BITS, 8):
            raise RecipeError(f"bits is {self.bits}", remedy="give 3, 4 or 8, or 0 not to round")
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
        >>> from secateur.sparsity.rounding import kept_weights, mark_kept
        >>> weight = torch.tensor([[0.5, 0.0, 0.0]])
        >>> mark_kept(weight, torch.tensor([[True, True, False]]))
        >>> kept_weights(weight.bfloat16())
        tensor([[ True,  True, False]])
    """
    weight.masked_fill_(weight == 0, 0.0).masked_fill_((weight == 0) & kept, -0.0)


def kept_weights(weight: Weight) -> Mask:
    """The mask of a weight from `mark_kept`: its nonzero values and its −0."""
    return (weight != 0) | torch.signbit(weight)


class RoundingSolver:
    """The part of a solver that has the parameters `bits`, `group` and `descent`."""

    bits: int
    group: int
    descent: int

    @property
    def rounding(self) -> Rounding:
        """How the kept weights are rounded."""
        return Rounding(self.bits, self.group, self.descent)

    @property
    def rounds(self) -> bool:
        """Whether the solver also rounds the remaining weights."""
        return self.bits > 0

    @property
    def grid(self) -> GroupGrid | None:
        """The grid of groups on which the weights then are."""
        return self.rounding.group_grid
