"""OSSCAR: removes whole units one by one, always the one that the others compensate best."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, cast

import torch
from torch import Tensor

from secateur.registry import Count, float32_bytes
from secateur.sparsity.hessian import FACTOR_SQUARES, inverse_factor, live_weight
from secateur.sparsity.patterns import Pattern, WholeUnits
from secateur.sparsity.solvers import Solution, solvers
from secateur.sparsity.solvers.least_squares import LeastSquares, PreparedHessian, systems_bytes
from secateur.types import Mask, Weight


@solvers.register("osscar")
@dataclass(frozen=True)
class OSSCAR(LeastSquares):
    """Greedy removal of whole units of columns, with all others re-optimised after each.

    With H = gram + λI, λ = damping · mean(diag(gram)), removing the columns p of a unit and giving
    the others their best values costs, and changes,

        ½ tr(W_p ([H⁻¹]_pp)⁻¹ W_pᵀ),    W ← W − W_p ([H⁻¹]_pp)⁻¹ [H⁻¹]_p:

    The unit with the least cost is removed (among equal ones, the one with the lower index). Then W
    and H⁻¹ are updated, and the next unit is chosen among the remaining ones. Units of one column
    (neurons) are removed `batch` at a time: this needs fewer updates, and within a batch the costs
    are those before it. Where units compete within sets, a set that has lost enough keeps the rest.
    At the end the kept columns are the exact minimisers for the chosen units, as in the solver
    `least-squares`. A given mask is held, and only refitted.

    Papers: Meng et al. 2024, "OSSCAR: One-Shot Structured Pruning in Vision and Language Models
    with Combinatorial Optimization", arXiv:2403.12983; Kurtic et al. 2023, "ZipLM",
    arXiv:2302.04089, for the update of H⁻¹. Deviations: no local search that swaps removed units
    for kept ones; the last refit is solved afresh, so that rounding of the updates does not stay.

    Args:
        batch: columns removed together, where a unit is one column; 1 is the plain greedy.

    Raises:
        RecipeError: the damping is negative or no number, or the batch below 1.

    Example:
        >>> import torch
        >>> from secateur.sparsity.patterns import parse_pattern
        >>> from secateur.sparsity.solvers.osscar import OSSCAR
        >>> solver = OSSCAR(damping=0.0)
        >>> prepared = solver.prepare({"gram": torch.tensor([[2.0, 1.0], [1.0, 2.0]])})
        >>> weight = torch.tensor([[1.0, 2.0], [0.0, 2.0]])
        >>> solver.choose(weight, prepared, parse_pattern("*x1"), 0.5).weight
        tensor([[0.0000, 2.5000],
                [0.0000, 2.0000]])
    """

    batch: Count = 8
    selects_by: ClassVar[str | None] = "obs"
    whole_units: ClassVar[bool] = True

    def choose(
        self, weight: Weight, prepared: PreparedHessian, pattern: Pattern, sparsity: float
    ) -> Solution:
        """Choose units, and refit the others; computed in float32.

        Args:
            weight: [out, in], any floating dtype; not changed.
            prepared: of the inputs of this linear.
            pattern: whole columns.
            sparsity: of the pattern.

        Raises:
            NumericalError: a weight is infinite or not a number, or H is not positive definite.
        """
        pattern.check((weight.shape[0], weight.shape[1]), sparsity)
        mask = self._remaining(weight, prepared, cast(WholeUnits, pattern), sparsity)
        return self.solve(weight, prepared, mask)

    def working_bytes(self, shape: tuple[int, int]) -> int:
        """Seven float32 copies of the weight, H⁻¹ in the making, and the last refit's systems."""
        return (
            7 * float32_bytes(shape)
            + FACTOR_SQUARES * float32_bytes((shape[1], shape[1]))
            + systems_bytes(1, shape[1])  # all rows share one
        )

    def _remaining(
        self, weight: Weight, prepared: PreparedHessian, pattern: WholeUnits, sparsity: float
    ) -> Mask:
        """The mask of the units that remain after enough were removed."""
        rows, columns = weight.shape
        left = pattern.units_pruned(columns, sparsity)
        alive = torch.ones(columns // pattern.width, dtype=torch.bool, device=weight.device)
        if left == len(alive):
            alive[:] = False
        elif left:
            factor, dead = inverse_factor(prepared.gram, self.damping)
            inverse = factor.t() @ factor  # H⁻¹ = UᵀU
            now = live_weight(weight, dead)
            # A wide unit is a batch by itself, and a set must not lose more than its share.
            together = self.batch if pattern.width == 1 and not pattern.among else 1
            allowed = pattern.units_pruned(pattern.columns_together, sparsity)
            while left:
                stays = ~alive  # what is gone cannot go again
                if pattern.among:
                    # A set that has lost its share keeps the rest.
                    full = stays.view(-1, pattern.among).sum(1) == allowed
                    stays = stays | full.repeat_interleave(pattern.among)
                costs = _costs(now, inverse, pattern.width).masked_fill(stays, torch.inf)
                gone = costs.argsort(stable=True)[: min(together, left)]
                alive[gone] = False
                left -= len(gone)
                if left:
                    _remove(now, inverse, gone, pattern.width)
        return alive.repeat_interleave(pattern.width)[None].expand(rows, -1).contiguous()


def _costs(weight: Tensor, inverse: Tensor, width: int) -> Tensor:
    """tr(W_p ([H⁻¹]_pp)⁻¹ W_pᵀ) of every unit, float32 [units]; removed units give any number."""
    if width == 1:
        # A block of one column is a number.
        return weight.square().sum(0) / inverse.diagonal()
    units = weight.shape[1] // width
    # The diagonal blocks [H⁻¹]_pp, [units, width, width], without a loop over units.
    own = inverse.unflatten(0, (units, width)).unflatten(2, (units, width))
    blocks = own.diagonal(dim1=0, dim2=2).permute(2, 0, 1).double()
    # [units, width, out]: W_pᵀ of every unit.
    parts = weight.unflatten(1, (units, width)).permute(1, 2, 0).double()
    return (parts * torch.linalg.solve(blocks, parts)).sum(dim=(1, 2)).float()


def _remove(weight: Tensor, inverse: Tensor, gone: Tensor, width: int) -> None:
    """Update W and H⁻¹ in place after a removal; removed units become a separate identity."""
    inside = torch.arange(width, device=gone.device)
    columns = (gone[:, None] * width + inside).flatten()
    across = inverse[columns].clone()  # [H⁻¹]_p:, before it is written over
    # ([H⁻¹]_pp)⁻¹ [H⁻¹]_p:, which changes both W and H⁻¹. In float64: errors add up over removals.
    solved = torch.linalg.solve(across[:, columns].double(), across.double()).float()
    # The kept weights take over what W_p did, as far as they can.
    weight -= weight[:, columns] @ solved
    inverse -= across.t() @ solved
    # Rounding leaves traces in what must now be exactly 0, and a 1 keeps later costs finite.
    weight[:, columns] = 0.0
    inverse[columns] = 0.0
    inverse[:, columns] = 0.0
    inverse[columns, columns] = 1.0
