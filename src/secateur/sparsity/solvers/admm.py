"""ADMM: comes close to least squares for a given mask, with one factorisation per input."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from jaxtyping import Bool, Float32
from torch import Tensor

from secateur.errors import NumericalError
from secateur.machine import add_product
from secateur.registry import Count, NonNegative, Positive, float32_bytes
from secateur.sparsity.hessian import cholesky, live_weight, scaled_hessian
from secateur.sparsity.solvers import Solution, SolverDefaults, solvers
from secateur.types import Gram, Mask, Statistics, Weight


class _PreparedProximal(NamedTuple):
    """The result that `ADMM` computes once for all linears that share an input.

    Attributes:
        proximal: ρ(A + ρI)⁻¹ with A the scaled H, float32 [in, in].
        scale: the roots of the diagonal of H, float32 [in].
        dead: inputs that were zero for every token, bool [in].
        gram: without damping, float32 [in, in]; not copied.
    """

    proximal: Float32[Tensor, "*batch in in"]
    scale: Float32[Tensor, "*batch in"]
    dead: Bool[Tensor, "*batch in"]
    gram: Gram


@solvers.register("admm")
@dataclass(frozen=True)
class ADMM(SolverDefaults):
    """Approaches the minimiser of ‖(W − Ŵ)X‖² + λ‖W − Ŵ‖² for a given mask by ADMM.

    With H = gram + λI, λ = damping · mean(diag(gram)), D = diag(H)^½, A = D⁻¹HD⁻¹ and B = WD, from
    Z = mask ⊙ B and U = B − Z:

        V = (BA + ρ(Z − U)) (A + ρI)⁻¹;    Z = mask ⊙ (V + U);    U ← U + V − Z.

    At last Ŵ = ZD⁻¹. V is computed as B + (Z − U − B) · ρ(A + ρI)⁻¹, the same in one product.
    The limit is that of the solver `least-squares`. The weights of dead columns become zero, as in
    the solver `obs`.

    Paper: Boža 2024, "Fast and Effective Weight Update for Pruned Large Language Models",
    arXiv:2401.02938. Deviations: the mask is given; the paper's best results find it by gradual
    pruning within the iterations. The damping is 0.01 of the mean diagonal before scaling, as in
    all solvers here; the released code adds 0.1 after scaling.

    Args:
        damping: fraction of the mean diagonal of the gram added to its diagonal.
        rho: the penalty ρ, against a diagonal of 1; larger is more careful and slower.
        iterations: how many, each a product of W and an [in, in].

    Raises:
        RecipeError: damping, rho or iterations are out of range.

    Example:
        >>> import torch
        >>> from secateur.sparsity.solvers.admm import ADMM
        >>> solver, mask = ADMM(damping=0.0), torch.tensor([[False, True]])
        >>> prepared = solver.prepare({"gram": torch.tensor([[2.0, 1.0], [1.0, 2.0]])})
        >>> solver.solve(torch.tensor([[1.0, 1.0]]), prepared, mask).weight
        tensor([[0.0000, 1.5000]])
    """

    damping: NonNegative = 0.01
    rho: Positive = 1.0
    iterations: Count = 20
    requires: ClassVar[frozenset[str]] = frozenset({"gram"})
    batched: ClassVar[bool] = True

    def prepare(self, statistics: Statistics) -> _PreparedProximal:
        """Scale the damped `gram`, float32 [in, in], and invert A + ρI.

        Raises:
            NumericalError: the gram is not finite, or zero everywhere, or ρ is too small for
                float32.
        """
        gram = statistics["gram"]
        scaled, scale, dead = scaled_hessian(gram, self.damping)
        scaled.diagonal(dim1=-2, dim2=-1).fill_(1 + self.rho)  # A + ρI: A has a unit diagonal
        lower = cholesky(scaled)
        if lower is None:
            raise NumericalError(
                f"the scaled gram of {gram.shape[-1]} inputs cannot be factorised with rho "
                f"{self.rho}",
                remedy="give a larger rho, usually 1",
            )
        return _PreparedProximal(torch.cholesky_inverse(lower).mul_(self.rho), scale, dead, gram)

    def solve(self, weight: Weight, prepared: _PreparedProximal, mask: Mask) -> Solution:
        """Refit one weight [out, in] of any floating dtype; computed in float32.

        Raises:
            NumericalError: a weight is infinite or not a number.
        """
        pruned = ~mask
        dense = live_weight(weight, prepared.dead).mul_(prepared.scale[..., None, :])  # B
        sparse = dense.masked_fill(pruned, 0.0)  # Z
        dual = dense - sparse  # U, as after an iteration that found V = B
        for _ in range(self.iterations):
            near = add_product(dense.clone(), sparse - dual - dense, prepared.proximal)  # V
            near += dual
            sparse = near.masked_fill(pruned, 0.0)
            dual = near.sub_(sparse)  # V + U − Z
        return Solution.measured(
            weight, sparse.div_(prepared.scale[..., None, :]), mask, prepared.gram
        )

    def working_bytes(self, shape: tuple[int, int]) -> int:
        """Six float32 copies of the weight, three of the gram."""
        return 6 * float32_bytes(shape) + 3 * float32_bytes((shape[1], shape[1]))
