"""OBS column sweep (SparseGPT, GPTQ): later columns compensate for pruning and rounding."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Bool, Float32
from torch import Tensor

from secateur.errors import RecipeError
from secateur.quantization.int8 import LARGEST, grid_rows
from secateur.sparsity.hessian import (
    FACTOR_SQUARES,
    check_damping,
    check_weight,
    inverse_factor,
    relative_output_error,
)
from secateur.sparsity.patterns import Pattern
from secateur.sparsity.solvers import Solution, solvers
from secateur.types import Gram, Mask, Statistics, Weight, float32_bytes

__all__ = ["OBS", "PreparedGram"]

# Columns swept one by one before one matmul applies their effect to the others. Measured on [1536,
# 576] and [576, 1536]: 16 to 64 differ by 3 %, 4 and 128 are 10 % slower.
_STEP_COLUMNS = 32


@dataclass(frozen=True)
class PreparedGram:
    """The result that `OBS` computes once for all linears that share an input.

    Attributes:
        factor: upper triangular U, UᵀU = H⁻¹, float32 [in, in].
        dead: inputs that were zero for every token, bool [in].
        gram: without damping, float32 [in, in]; not copied.
    """

    factor: Float32[Tensor, "in in"]
    dead: Bool[Tensor, " in"]
    gram: Gram


@solvers.register("obs")
@dataclass(frozen=True)
class OBS:
    """Prunes column after column, and updates the columns to the right to compensate.

    With UᵀU = H⁻¹ upper triangular and H the damped gram, for each column i from left to right

        e = W_:i / U_ii where pruned, else 0;      W_:j ← W_:j − e · U_ij for all j >= i.

    Without a given mask, the weights with the smallest W_ij² / U_jj² are pruned, judged by the
    weights as they are when the sweep arrives: at each lazy block of `block_columns` columns, or
    at each group of an N:M pattern. Rows or the layer compete within one lazy block.

    Paper: Frantar and Alistarh 2023, "SparseGPT: Massive Language Models Can Be Accurately Pruned
    in One-Shot", arXiv:2301.00774. Deviations: the number of zeros is exact (each lazy block gets
    the share that makes the running total right; the released code prunes one more in each, and
    more under ties); the mean diagonal, by which the damping is scaled, is that of the gram
    itself, where the released code first sets it to 1 for dead columns; a gram that cannot be
    factorised is an error. As in the released code, the weights of dead columns become zero; they
    score 0, are pruned first, and count as kept where more are dead than the pattern prunes.

    With `bits` 8 the same sweep also rounds the remaining weights: a column becomes Q_:i = s ·
    clamp(round(W_:i / s), −127, 127) with one scale s for each row, and e counts what rounding
    changed, e = (W_:i − Q_:i) / U_ii (Frantar et al. 2022, "GPTQ", arXiv:2210.17323, and section
    3.5 of SparseGPT). s is the largest magnitude of the row / 127, that magnitude rounded to 8
    significant bits; the weight which has it becomes ±127 s. So the largest weight of a row
    determines its scale, in any dtype, and `secateur compress --values int8` does not change the
    row.

    Args:
        damping: fraction of the mean diagonal of the gram added to its diagonal.
        block_columns: columns in a lazy block; rounded down to whole groups or blocks.
        bits: 8 to round to int8 with one scale for each row; 0 not to round.

    Raises:
        RecipeError: damping, block_columns or bits are out of range.

    Example:
        >>> import torch
        >>> from secateur.sparsity.patterns import parse_pattern
        >>> from secateur.sparsity.solvers.obs import OBS
        >>> solver, mask = OBS(damping=0.0), torch.tensor([[False, True]])
        >>> prepared = solver.prepare({"gram": torch.tensor([[2.0, 1.0], [1.0, 2.0]])})
        >>> pattern = parse_pattern("unstructured")
        >>> solver.solve(torch.tensor([[1.0, 1.0]]), prepared, pattern, 0.5, mask=mask).weight
        tensor([[0.0000, 1.5000]])
    """

    damping: float = 0.01
    block_columns: int = 128
    bits: int = 0
    requires: ClassVar[frozenset[str]] = frozenset({"gram"})
    selects_by: ClassVar[str | None] = "obs"
    whole_units: ClassVar[bool] = False
    shifts: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_damping(self.damping)
        if self.block_columns < 1:
            raise RecipeError(
                f"block_columns is {self.block_columns}", remedy="give 1 or more, usually 128"
            )
        if self.bits not in (0, 8):
            raise RecipeError(f"bits is {self.bits}", remedy="give 8, or 0 not to round")

    @property
    def rounds(self) -> bool:
        """Whether the solver also rounds the remaining weights."""
        return self.bits > 0

    def prepare(self, statistics: Statistics) -> PreparedGram:
        """Factorise the damped `gram`, float32 [in, in].

        Raises:
            NumericalError: the damped gram cannot be factorised.
        """
        gram = statistics["gram"]
        factor, dead = inverse_factor(gram, self.damping)
        return PreparedGram(factor, dead, gram)

    def solve(
        self,
        weight: Weight,
        prepared: PreparedGram,
        pattern: Pattern,
        sparsity: float,
        *,
        mask: Mask | None = None,
    ) -> Solution:
        """Prune one weight [out, in] of any floating dtype; computed in float32.

        Args:
            weight: not changed.
            prepared: of the inputs of this linear.
            pattern: the zeros that are allowed; not consulted if a mask is given.
            sparsity: the fraction of zeros; not consulted if a mask is given.
            mask: held if given; otherwise selected during the sweep.

        Raises:
            PatternError: the pattern cannot hold this sparsity or shape.
            NumericalError: a weight is infinite or not a number.
        """
        check_weight(weight)
        if mask is None:
            rows, inputs = weight.shape
            pattern.check((rows, inputs), sparsity)
        # Transposed, so that every column of the weight is contiguous during the sweep.
        columns = (
            weight.detach().t().to(torch.float32, memory_format=torch.contiguous_format, copy=True)
        )
        columns.masked_fill_(prepared.dead[:, None], 0.0)
        if mask is None:
            kept = torch.empty(columns.shape, dtype=torch.bool, device=columns.device)
        else:
            kept = mask.t().contiguous()
        choice = None if mask is not None else _Choice(pattern, sparsity)
        grid = None
        if self.rounds:
            grid = _Grid.of(columns if mask is None else columns.masked_fill(~kept, 0.0))
        self._sweep(columns, kept, prepared.factor, choice, grid)
        solved = columns.t().contiguous()
        return Solution(
            weight=solved,
            mask=kept.t().contiguous() if mask is None else mask,
            error=relative_output_error(weight, solved, prepared.gram),
        )

    def working_bytes(self, shape: tuple[int, int]) -> int:
        """Six float32 copies of the weight, and the matrices of the factorisation."""
        return 6 * float32_bytes(shape) + FACTOR_SQUARES * float32_bytes((shape[1], shape[1]))

    def flops(self, shape: tuple[int, int], pattern: Pattern, sparsity: float) -> float:
        """0: linears share all factorisations."""
        return 0.0

    def _sweep(
        self,
        columns: Tensor,
        kept: Tensor,
        factor: Tensor,
        choice: _Choice | None,
        grid: _Grid | None,
    ) -> None:
        """Solve `columns` [in, out] in place, lazy block by lazy block; fill `kept` if chosen."""
        together = choice.pattern.columns_together if choice else 1
        width = max(self.block_columns // together, 1) * together
        for start in range(0, len(columns), width):
            block = columns[start : start + width]
            stop = start + len(block)
            block_factor = factor[start:stop, start:stop]
            block_kept = kept[start:stop]
            if choice and not choice.by_group:
                block_kept.copy_(choice.of_block(block, block_factor.diagonal(), start))
            block_grid = grid.from_column(start) if grid else None
            errors = _sweep_block(block, block_kept, block_factor, choice, block_grid)
            columns[stop:].addmm_(factor[start:stop, stop:].t(), errors, alpha=-1)


@dataclass(frozen=True)
class _Choice:
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


@dataclass(frozen=True)
class _Grid:
    """The allowed values for the weights of each row.

    Attributes:
        peak: the largest of each row, float32 [out]; the scale is this / 127.
        column: where it is, int64 [out].
    """

    peak: Tensor
    column: Tensor

    @staticmethod
    def of(columns: Tensor) -> _Grid:
        """The grid of weights [in, out]."""
        peak, column = columns.abs().max(dim=0)
        return _Grid(grid_rows(peak), column)

    def from_column(self, start: int) -> _Grid:
        """The grid of a block that begins at column `start`."""
        return _Grid(self.peak, self.column - start)

    def round(self, weight: Tensor, index: int) -> Tensor:
        """A column [out] of the block, rounded."""
        scale = self.peak / LARGEST
        rounded = (weight / scale).round_().clamp_(-LARGEST, LARGEST).mul_(scale)
        return torch.where(self.column == index, self.peak.copysign(weight), rounded)


def _sweep_block(
    block: Tensor, kept: Tensor, factor: Tensor, choice: _Choice | None, grid: _Grid | None
) -> Tensor:
    """Solve one lazy block [columns, out] in place; return the errors e [columns, out].

    Left-looking: a column receives the errors of all columns before it when its turn comes. So
    every weight is read and written once, not once per column to its left.
    """
    errors = torch.empty_like(block)
    by_group = choice is not None and choice.by_group
    step = choice.pattern.columns_together if choice and by_group else _STEP_COLUMNS
    diagonal = factor.diagonal()
    for start in range(0, len(block), step):
        span = slice(start, min(start + step, len(block)))
        current = block[span]
        if start:
            current.addmm_(factor[:start, span].t(), errors[:start], alpha=-1)
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
            rounded = grid.round(column, start + i) * kept[start + i]
            torch.sub(column, rounded, out=error).div_(diagonal[start + i])
            column.copy_(rounded)
        current.masked_fill_(pruned, 0.0)
    return errors
