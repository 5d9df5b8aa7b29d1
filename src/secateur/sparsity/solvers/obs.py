"""OBS column sweep (SparseGPT, GPTQ): later columns compensate for pruning and rounding."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, NamedTuple

from jaxtyping import Bool, Float32
from torch import Tensor

from secateur.errors import PatternError
from secateur.parallel.ranks import ALONE, Ranks
from secateur.quantization.groups import GroupGrid
from secateur.quantization.sweep_grids import GroupColumns
from secateur.registry import Count, float32_bytes
from secateur.sparsity import hessian
from secateur.sparsity.column_sweep import Choice, round_on_mask, sweep, sweep_grid
from secateur.sparsity.patterns import Pattern
from secateur.sparsity.solvers import RoundingSolver, Solution, solvers
from secateur.types import Gram, Mask, Statistics, Weight


class _PreparedGram(NamedTuple):
    """The result that `OBS` computes once for all linears that share an input.

    Attributes:
        factor: upper triangular U, UᵀU = H⁻¹, float32 [in, in].
        dead: inputs that were zero for every token, bool [in].
        gram: without damping, float32 [in, in]; not copied.
    """

    factor: Float32[Tensor, "*batch in in"]
    dead: Bool[Tensor, "*batch in"]
    gram: Gram


@solvers.register("obs")
@dataclass(frozen=True)
class OBS(RoundingSolver):
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

    With `bits`, the least error without a grid is found for the mask when it is known, and a second
    sweep rounds these weights: e counts what rounding changed, e = (W_:i − Q_:i) / U_ii (Frantar et
    al. 2022, "GPTQ", arXiv:2210.17323). Section 3.5 of SparseGPT rounds in the sweep that prunes.
    The fit on the mask is not in the papers; it saves most of the error.

    With `bits` 8, Q_:i = s · clamp(round(W_:i / s), −127, 127) with one scale s for each row. s is
    the largest magnitude of the row / 127, that magnitude rounded to 8 significant bits; the weight
    which has it becomes ±127 s. So the largest weight of a row determines its scale, in any dtype,
    and `secateur compress --values int8` does not change the row.

    With `bits` 2, 3 or 4, `group` weights of a row in turn share a scale (`quantization.groups`).
    It is chosen when the sweep arrives at the group, by the kept weights as they are then, each
    with importance 1 / U_jj². The sweep that selects the mask rounds to these grids too. After the
    second one, coordinate descent improves integers and scales (`sparsity.column_sweep`).

    With a type of llama.cpp as `bits`, its blocks are the grid (`quantization.blocks`). Zeros stay
    only in types that have an exact 0.

    Args:
        block_columns: columns in a lazy block; rounded down to whole groups or blocks.

    Raises:
        RecipeError: a parameter is out of range.

    Example:
        >>> import torch
        >>> from secateur.sparsity.solvers.obs import OBS
        >>> solver, mask = OBS(damping=0.0), torch.tensor([[False, True]])
        >>> prepared = solver.prepare({"gram": torch.tensor([[2.0, 1.0], [1.0, 2.0]])})
        >>> solver.solve(torch.tensor([[1.0, 1.0]]), prepared, mask).weight
        tensor([[0.0000, 1.5000]])
    """

    refit_steps: Count = 10
    block_columns: Count = 128
    requires: ClassVar[frozenset[str]] = frozenset({"gram"})
    selects_by: ClassVar[str | None] = "obs"
    batched: ClassVar[bool] = True
    by_rows: ClassVar[bool] = True

    def prepare(self, statistics: Statistics, ranks: Ranks = ALONE) -> _PreparedGram:
        """Factorise the damped `gram`, float32 [in, in]. Every process does it.

        Raises:
            NumericalError: the damped gram cannot be factorised.
        """
        gram = statistics["gram"]
        factor, dead = hessian.inverse_factor(gram, self.damping)
        return _PreparedGram(factor, dead, gram)

    def solve(self, weight: Weight, prepared: _PreparedGram, mask: Mask) -> Solution:
        """Prune one weight [out, in] of any floating dtype by a mask; computed in float32.

        Raises:
            NumericalError: a weight is infinite or not a number.
        """
        columns, kept, blocks = self._columns(weight, prepared), mask.mT.contiguous(), None
        if self.rounds:
            columns, blocks = self._rounded(columns, kept, prepared)
        else:
            sweep(columns, kept, prepared.factor, self.block_columns)
        return Solution.measured(weight, columns.mT.contiguous(), mask, prepared.gram, blocks)

    def choose(
        self, weight: Weight, prepared: _PreparedGram, pattern: Pattern, sparsity: float
    ) -> Solution:
        """Prune one weight [out, in] of any floating dtype; computed in float32.

        Raises:
            PatternError: the pattern cannot hold this sparsity or shape.
            NumericalError: a weight is infinite or not a number.
        """
        *_, rows, inputs = weight.shape
        pattern.check((rows, inputs), sparsity)
        groups = self.grid if isinstance(self.grid, GroupGrid) else None
        if groups and pattern.scope == "group" and self.group % pattern.columns_together:
            raise PatternError(
                f"groups of {pattern.columns_together} columns do not divide the {self.group} "
                "that share a scale",
                remedy="choose another pattern, or prune first and round afterwards",
            )
        columns = self._columns(weight, prepared)
        kept = columns.bool()  # filled by the choice
        target = columns.clone() if self.rounds else columns
        # With 8 bits the choice does not round: a row's scale is its largest kept weight, which is
        # known only when the mask is. With blocks of llama.cpp it need not: they lose little.
        grid = GroupColumns(groups, columns) if groups else None
        # U is of the whole gram: the choice needs no factorisation of its own.
        choice = Choice(pattern, sparsity)
        sweep(columns, kept, prepared.factor, self.block_columns, choice, grid)
        blocks = None
        if self.rounds:  # again, from the weight: the sweep was for the mask alone
            columns, blocks = self._rounded(target, kept, prepared)
        solved, mask = columns.mT.contiguous(), kept.mT.contiguous()
        return Solution.measured(weight, solved, mask, prepared.gram, blocks)

    def _columns(self, weight: Weight, prepared: _PreparedGram) -> Tensor:
        """The weight transposed, so that every column is contiguous during the sweep."""
        return hessian.live_weight(weight, prepared.dead).mT.contiguous()

    def working_bytes(self, shape: tuple[int, int]) -> int:
        """The factorisation; or its result and copies of the weight, in float32."""
        return self._peak(shape, hessian.FACTOR_SQUARES)

    def fallback_bytes(self, shape: tuple[int, int]) -> int:
        """The part of `working_bytes` that only a factorisation in float64 takes."""
        squares = hessian.FACTOR_SQUARES
        return self._peak(shape, squares) - self._peak(shape, squares // 2)

    def _peak(self, shape: tuple[int, int], squares: int) -> int:
        """The peak where the factorisation takes so many matrices [in, in]."""
        square = float32_bytes((shape[1], shape[1]))
        copies = 9 if self.rounds else 3
        return max(squares * square, square + copies * float32_bytes(shape))

    def _rounded(
        self, target: Tensor, kept: Tensor, prepared: _PreparedGram
    ) -> tuple[Tensor, Tensor | None]:
        """Fit the kept weights to the target [..., in, out], and round them; with their blocks."""
        diagonal, _ = hessian.damped_diagonal(prepared.gram, self.damping)
        # Conjugate gradients converge soonest on a unit diagonal: B = W ⊙ s, A = H / s sᵀ.
        scaled, scale, _ = hessian.scaled_hessian(prepared.gram, self.damping)
        dense, mask = target.mT * scale[..., None, :], kept.mT
        fitted = hessian.fit_on_mask(dense * mask, dense @ scaled, scaled, mask, self.refit_steps)
        columns = fitted.div_(scale[..., None, :]).mT.contiguous()
        grid = sweep_grid(columns, self.bits, self.grid)
        blocks = round_on_mask(
            columns, grid, target, kept, prepared.gram, diagonal, prepared.factor, self.descent
        )
        return columns, blocks
