"""Zeroing: pruned weights become zero, the others do not change."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from secateur.sparsity.patterns import Pattern
from secateur.sparsity.solvers import Solution, SolverDefaults, required_mask, solvers
from secateur.types import Mask, Statistics, Weight, float32_bytes


@solvers.register("zero")
@dataclass(frozen=True)
class Zeroing(SolverDefaults):
    """Ŵ = mask ⊙ W; needs no statistics and measures no error.

    Example:
        >>> import torch
        >>> from secateur.sparsity.patterns import parse_pattern
        >>> from secateur.sparsity.solvers.zeroing import Zeroing
        >>> mask = torch.tensor([[True, False]])
        >>> pattern = parse_pattern("unstructured")
        >>> Zeroing().solve(torch.tensor([[3.0, -1.0]]), None, pattern, 0.5, mask=mask).weight
        tensor([[3., 0.]])
    """

    requires: ClassVar[frozenset[str]] = frozenset()

    def prepare(self, statistics: Statistics) -> None:
        """Nothing to compute from the inputs."""

    def solve(
        self,
        weight: Weight,
        prepared: None,
        pattern: Pattern,
        sparsity: float,
        *,
        mask: Mask | None = None,
    ) -> Solution:
        """Zero a weight [out, in] where the mask is False.

        Raises:
            RecipeError: no mask was given; this solver cannot choose one.
        """
        mask = required_mask(mask, "zero")
        pruned = weight.detach().float().masked_fill(~mask, 0.0)
        return Solution(weight=pruned, mask=mask, error=None)

    def working_bytes(self, shape: tuple[int, int]) -> int:
        """Three float32 copies of the weight."""
        return 3 * float32_bytes(shape)
