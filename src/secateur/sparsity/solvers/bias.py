"""Bias: pruned weights become zero, and the bias takes over their mean output."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Float32
from torch import Tensor

from secateur.registry import float32_bytes
from secateur.sparsity.solvers import Solution, SolverDefaults, solvers
from secateur.types import Mask, Statistics, Weight


@solvers.register("bias")
@dataclass(frozen=True)
class Bias(SolverDefaults):
    """Ŵ = mask ⊙ W and b ← b + (W − Ŵ) μ, where μ is the mean input.

    The mean output does not change. A linear without a bias gets none, so that the model keeps its
    class; there this equals the solver `zero`.

    Paper: An et al. 2023, "Fluctuation-based Adaptive Structured Pruning for Large Language
    Models" (FLAP), arXiv:2312.11983. Deviation: the released code adds missing biases, and such a
    model needs its own code to load.

    Example:
        >>> import torch
        >>> from secateur.sparsity.solvers.bias import Bias
        >>> solver, mask = Bias(), torch.tensor([[True, False]])
        >>> mean = solver.prepare({"column_mean": torch.tensor([0.0, 0.5])})
        >>> solution = solver.solve(torch.tensor([[3.0, -1.0]]), mean, mask)
        >>> solution.weight, solution.shift
        (tensor([[3., 0.]]), tensor([-0.5000]))
    """

    requires: ClassVar[frozenset[str]] = frozenset({"column_mean"})
    shifts: ClassVar[bool] = True
    batched: ClassVar[bool] = True

    def prepare(self, statistics: Statistics) -> Float32[Tensor, "*batch in"]:
        """μ."""
        return statistics["column_mean"]

    def solve(self, weight: Weight, prepared: Float32[Tensor, "*batch in"], mask: Mask) -> Solution:
        """Zero a weight [out, in] where the mask is False, and return the shift of the bias."""
        dense = weight.detach().float()
        # W − Ŵ is W where pruned: the mask takes the kept weights out.
        shift = (dense.masked_fill(mask, 0.0) @ prepared[..., None])[..., 0]
        return Solution(dense.masked_fill(~mask, 0.0), mask, error=None, shift=shift)

    def working_bytes(self, shape: tuple[int, int]) -> int:
        """Three float32 copies of the weight."""
        return 3 * float32_bytes(shape)
