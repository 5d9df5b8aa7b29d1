"""ALPS: find the mask and the weights together, by ADMM on the layer-wise error; then refit."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, ClassVar, NamedTuple

import torch
from jaxtyping import Bool, Float32
from pydantic import Field
from torch import Tensor

from secateur.parallel.ranks import ALONE, Ranks
from secateur.registry import Count, NonNegative, Positive, float32_bytes
from secateur.sparsity.column_sweep import round_on_mask, sweep_grid
from secateur.sparsity.hessian import fit_on_mask, inverse_factor, live_weight, scaled_hessian
from secateur.sparsity.patterns import Pattern
from secateur.sparsity.shared_rows import SharedRows
from secateur.sparsity.shifted_inverse import ShiftedInverse
from secateur.sparsity.solvers import RoundingSolver, Solution, solvers
from secateur.types import Gram, Mask, Statistics, Weight

# The support is compared, and ρ has grown by `growth`, once in this many iterations.
_STAGE = 3
# ρ grows at most to so many times its first value; the support stops changing long before.
_RANGE = 100.0


class _ScaledGram(NamedTuple):
    """The result that `ALPS` computes once for all linears that share an input.

    Attributes:
        scale: s_j = √(G_jj + damping · mean(diag G)), float32 [in].
        hessian: A = (G + damping · mean(diag G) · I) / s sᵀ, unit diagonal, float32 [in, in].
        dead: inputs that were zero for every token, bool [in].
        gram: G, without damping, float32 [in, in]; not copied.
        inverse: (A + ρI)⁻¹ for the ρ of all iterations; computed when first needed.
        factor: upper triangular U, UᵀU = H⁻¹, float32 [in, in]; None where nothing is rounded.
    """

    scale: Float32[Tensor, "*batch in"]
    hessian: Float32[Tensor, "*batch in in"]
    dead: Bool[Tensor, "*batch in"]
    gram: Gram
    inverse: ShiftedInverse
    factor: Float32[Tensor, "*batch in in"] | None = None


@solvers.register("alps")
@dataclass(frozen=True)
class ALPS(RoundingSolver):
    """Minimises tr((Ŵ − W) H (Ŵ − W)ᵀ) over all Ŵ with the given number of zeros.

    In the scaled space B = W ⊙ s, A = H / s sᵀ, with D the pruned copy and V the dual variable of
    B = D, each iteration is

        B ← (B₀A − V + ρD)(A + ρI)⁻¹;    D ← P(B + V/ρ);    V ← V + ρ(B − D)

    where P keeps the largest squares that the pattern allows. ρ begins at `rho` and grows with
    every iteration, by `growth` in three of them, so that B and D are forced to agree; it ends when
    fewer than `tolerance` of the kept weights changed places in three iterations. The support of
    P(B) is then held, and conjugate-gradient steps find the weights on it:

        X ← argmin tr((X − B₀) A (X − B₀)ᵀ),  X = 0 where pruned;    Ŵ = X / s.

    With `bits` the kept weights are then rounded, and compensate each other's rounding errors
    (`sparsity.column_sweep`).

    With a given mask only the refit is done, in `refit_steps`. After a search the weights are
    nearly solved, so the refit takes half as many. The weights of dead columns become zero, as in
    the solver `obs`.

    Paper: Meng et al. 2024, "ALPS: Improved Optimization for Highly Sparse One-Shot Pruning for
    Large Language Models", arXiv:2406.07831. Deviations: ρ follows a fixed course; the released
    code raises it by the change of the support. (A + ρI)⁻¹ is a sum of a few inverses in float32
    (`ShiftedInverse`); the released code computes it for each ρ from an eigendecomposition in
    float64. Weights may also compete within rows or blocks. Counts are exact.

    Args:
        iterations: of ADMM, at most.
        rho: penalty at the start.
        growth: of the penalty, in three iterations; to a hundred times `rho` at most.
        tolerance: share of the kept weights that may change in three iterations at the end.
        refit_steps: conjugate-gradient steps for a given mask; half of them after a search.

    Raises:
        RecipeError: a parameter is out of range.

    Example:
        >>> import torch
        >>> from secateur.sparsity.solvers.alps import ALPS
        >>> solver, mask = ALPS(damping=0.0), torch.tensor([[False, True]])
        >>> prepared = solver.prepare({"gram": torch.tensor([[2.0, 1.0], [1.0, 2.0]])})
        >>> solution = solver.solve(torch.tensor([[1.0, 1.0]]), prepared, mask)
        >>> [round(weight, 4) for weight in solution.weight[0].tolist()]
        [0.0, 1.5]
    """

    iterations: Count = 45
    rho: Positive = 0.1
    growth: Annotated[float, Field(ge=1, allow_inf_nan=False)] = 1.2
    tolerance: NonNegative = 0.01
    requires: ClassVar[frozenset[str]] = frozenset({"gram"})
    selects_by: ClassVar[str | None] = "wanda"
    batched: ClassVar[bool] = True
    by_rows: ClassVar[bool] = True

    def prepare(self, statistics: Statistics, ranks: Ranks = ALONE) -> _ScaledGram:
        """Damp and scale the `gram`, float32 [in, in]. The processes invert one matrix each.

        Raises:
            NumericalError: the gram is not finite, or is zero everywhere.
        """
        gram = statistics["gram"]
        hessian, scale, dead = scaled_hessian(gram, self.damping)
        # From the first ρ to the last that can occur; nothing is inverted yet.
        inverse = ShiftedInverse(hessian, self.rho, self._rho(self.iterations), ranks)
        factor = inverse_factor(gram, self.damping)[0] if self.rounds else None
        return _ScaledGram(scale, hessian, dead, gram, inverse, factor)

    def solve(self, weight: Weight, prepared: _ScaledGram, mask: Mask) -> Solution:
        """Refit one weight [out, in] of any floating dtype; computed in float32.

        Raises:
            NumericalError: a weight is infinite or not a number.
        """
        dense = self._scaled(weight, prepared)
        return self._refitted(weight, prepared, mask, dense, dense, self.refit_steps)

    def choose(
        self, weight: Weight, prepared: _ScaledGram, pattern: Pattern, sparsity: float
    ) -> Solution:
        """Prune one weight [out, in] of any floating dtype; computed in float32.

        Raises:
            PatternError: the pattern cannot hold this sparsity or shape.
            NumericalError: a weight is infinite or not a number.
        """
        *_, rows, inputs = weight.shape
        pattern.check((rows, inputs), sparsity)
        dense = self._scaled(weight, prepared)
        start, mask = self._search(dense, prepared, pattern, sparsity)
        return self._refitted(weight, prepared, mask, dense, start, -(-self.refit_steps // 2))

    def _scaled(self, weight: Weight, prepared: _ScaledGram) -> Tensor:
        """B₀ = W ⊙ s."""
        return live_weight(weight, prepared.dead).mul_(prepared.scale[..., None, :])

    def _refitted(
        self,
        weight: Weight,
        prepared: _ScaledGram,
        mask: Mask,
        dense: Tensor,
        start: Tensor,
        steps: int,
    ) -> Solution:
        """Fit the weights of a mask, from a start in the scaled space, and round them."""
        target = dense @ prepared.hessian
        solved = fit_on_mask(start * mask, target, prepared.hessian, mask, steps)
        solved /= prepared.scale[..., None, :]
        blocks = None
        if prepared.factor is not None:
            # The sweep goes over columns, so all that it touches is transposed: [..., in, out].
            held = solved, dense / prepared.scale[..., None, :], mask
            columns, target, kept = (x.mT.contiguous() for x in held)
            diagonal = prepared.scale.square()  # of H: s was its root
            grid = sweep_grid(columns, self.bits, self.grid)
            blocks = round_on_mask(
                columns, grid, target, kept, prepared.gram, diagonal, prepared.factor, self.descent
            )
            solved = columns.mT.contiguous()
        return Solution.measured(weight, solved, mask, prepared.gram, blocks)

    def working_bytes(self, shape: tuple[int, int]) -> int:
        """Ten float32 copies of the weight, nine of the gram; one more of it if bits are given.

        These are A, the sum of inverses, three inverses, and four for the last one while it is
        computed; and U.
        """
        squares = 10 if self.rounds else 9
        return 10 * float32_bytes(shape) + squares * float32_bytes((shape[1], shape[1]))

    def _search(
        self, dense: Tensor, prepared: _ScaledGram, pattern: Pattern, sparsity: float
    ) -> tuple[Tensor, Mask]:
        """ADMM in the scaled space: the last B, and the mask of its largest squares."""
        target = dense @ prepared.hessian  # B₀A
        support = pattern.mask(dense.square(), sparsity)
        agreed = dense * support  # D
        dual = torch.zeros_like(dense)  # V
        # Written over in every iteration: B, the right side of its system, and (A + ρI)⁻¹.
        free, right = torch.empty_like(dense), torch.empty_like(dense)
        inverse = torch.empty_like(prepared.hessian)
        found, only = free, None  # the last B of all matrices; the numbers of those that go on
        for iteration in range(1, self.iterations + 1):
            rho = self._rho(iteration)
            torch.sub(target, dual, out=right).add_(agreed, alpha=rho)
            torch.matmul(right, prepared.inverse.at(rho, inverse, only), out=free)
            torch.add(free, dual, alpha=1 / rho, out=agreed)
            # P: the squares in the scaled space are what a weight alone costs, W_ij² H_jj.
            kept = pattern.mask(torch.square(agreed, out=right), sparsity)
            agreed *= kept
            dual.add_(free, alpha=rho).sub_(agreed, alpha=rho)
            # The support is compared every third time, when ρ has grown by `growth`.
            if iteration % _STAGE == 0:
                counts = torch.stack([(kept != support).sum((-2, -1)), kept.sum((-2, -1))])
                if isinstance(pattern, SharedRows):
                    pattern.ranks.total(counts)
                changed, of = counts[0], counts[1].double()
                moving = (changed > self.tolerance * of).flatten().nonzero()[:, 0]
                if not len(moving):
                    break
                support = kept
                if dense.dim() > 2 and len(moving) < len(free):
                    # What has ended leaves the batch, with its last B.
                    if only is not None:
                        found[only] = free
                    only = moving if only is None else only[moving]
                    target, dual = target[moving], dual[moving]
                    agreed, support = agreed[moving], support[moving]
                    free, right = free[moving], right[: len(moving)]
                    inverse = inverse[: len(moving)]
        if only is not None:
            found[only] = free
        # Mask and start are those of B, which solves the system; D only pulled it to the pattern.
        return found, pattern.mask(found.square(), sparsity)

    def _rho(self, iteration: int) -> float:
        """ρ of an iteration, the first being 1."""
        exponent = (iteration - 1) / _STAGE
        if self.growth > 1:
            # growth ** exponent is at most _RANGE.
            exponent = min(exponent, math.log(_RANGE) / math.log(self.growth))
        return self.rho * self.growth**exponent
