"""ADMM: comes close to least squares for a given mask, with one factorisation per input."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Bool, Float32
from torch import Tensor

from secateur.errors import NumericalError, RecipeError
from secateur.sparsity.hessian import (
    check_damping,
    check_weight,
    cholesky,
    relative_output_error,
    scaled_hessian,
)
from secateur.sparsity.solvers import Solution, SolverDefaults, solvers
from secateur.types import Gram, Mask, Statistics, Weight, float32_bytes


@dataclass(frozen=True)
class PreparedProximal:
    """The result that `ADMM` computes once for all linears that share an input.

    Attributes:
        proximal: ρ(A + ρI)⁻¹ with A the scaled H, float32 [in, in].
        scale: the roots of the diagonal of H, float32 [in].
        dead: inputs that were zero for every token, bool [in].
        gram: without damping, float32 [in, in]; not copied.
    """

    proximal: Float32[Tensor, "in in"]
    scale: Float32[Tensor, " in"]
    dead: Bool[Tensor, " in"]
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

    damping: float = 0.01
    rho: float = 1.0
    iterations: int = 20
    requires: ClassVar[frozenset[str]] = frozenset({"gram"})

    def __post_init__(self) -> None:
        check_damping(self.damping)
        if not 0 < self.rho < float("inf"):
            raise RecipeError(f"rho is {self.rho}", remedy="give a number above 0, usually 1")
        if self.iterations < 1:
            raise RecipeError(
                f"iterations is {self.iterations}", remedy="give 1 or more, usually 20"
            )

    def prepare(self, statistics: Statistics) -> PreparedProximal:
        """Scale the damped `gram`, float32 [in, in], and invert A + ρI.

        Raises:
            NumericalError: the gram is not finite, or zero everywhere, or ρ is too small for
                float32.
        """
        gram = statistics["gram"]
        scaled, scale, dead = scaled_hessian(gram, self.damping)
        scaled.diagonal().fill_(1 + self.rho)
        lower = cholesky(scaled)
        if lower is None:
            raise NumericalError(
                f"the scaled gram of {len(gram)} inputs cannot be factorised with rho {self.rho}",
                remedy="give a larger rho, usually 1",
            )
        return PreparedProximal(torch.cholesky_inverse(lower).mul_(self.rho), scale, dead, gram)

    def solve(self, weight: Weight, prepared: PreparedProximal, mask: Mask) -> Solution:
        """Refit one weight [out, in] of any floating dtype; computed in float32.

        Raises:
            NumericalError: a weight is infinite or not a number.
        """
        check_weight(weight)
        pruned = ~mask
        dense = (weight.detach().float() * prepared.scale).masked_fill_(prepared.dead, 0.0)
        sparse = dense.masked_fill(pruned, 0.0)
        dual = dense - sparse
        for _ in range(self.iterations):
            near = torch.addmm(dense, sparse - dual - dense, prepared.proximal)
            near += dual
            sparse = near.masked_fill(pruned, 0.0)
            dual = near.sub_(sparse)
        solved = sparse.div_(prepared.scale)
        return Solution(solved, mask, relative_output_error(weight, solved, prepared.gram))

    def working_bytes(self, shape: tuple[int, int]) -> int:
        """Six float32 copies of the weight, three of the gram."""
        return 6 * float32_bytes(shape) + 3 * float32_bytes((shape[1], shape[1]))
