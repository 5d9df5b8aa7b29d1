"""Zeroing: pruned weights become zero; the others stay, or are rounded to the nearest."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from secateur.quantization.blocks import BlockGrid
from secateur.quantization.groups import Group
from secateur.quantization.int8 import nearest_rows
from secateur.registry import float32_bytes
from secateur.sparsity.column_sweep import mark_kept
from secateur.sparsity.solvers import Bits, Solution, SolverDefaults, solvers
from secateur.types import Mask, Statistics, Weight


@solvers.register("zero")
@dataclass(frozen=True)
class Zeroing(SolverDefaults):
    """Ŵ = mask ⊙ W; needs no statistics and measures no error.

    With `bits`, the kept weights are then rounded to the nearest of their grid. Nothing makes up
    for what rounding changes. Weights that are on such a grid already stay as they are.

    Args:
        bits: 2, 3 or 4 to round in groups, 8 to round to int8 with one scale for each row, a type
            of llama.cpp such as q4_k to round to its blocks; 0 not to round.
        group: 32, 64 or 128 weights of a row that share a scale; for 2 to 4 bits.

    Raises:
        RecipeError: a parameter is out of range.

    Example:
        >>> import torch
        >>> from secateur.sparsity.solvers.zeroing import Zeroing
        >>> mask = torch.tensor([[True, False]])
        >>> Zeroing().solve(torch.tensor([[3.0, -1.0]]), None, mask).weight
        tensor([[3., 0.]])
    """

    bits: Bits = 0
    group: Group = 64
    requires: ClassVar[frozenset[str]] = frozenset()
    batched: ClassVar[bool] = True

    def prepare(self, statistics: Statistics) -> None:
        """Nothing to compute from the inputs."""

    def solve(self, weight: Weight, prepared: None, mask: Mask) -> Solution:
        """Zero a weight [out, in] where the mask is False."""
        pruned = weight.detach().float().masked_fill(~mask, 0.0)
        rows = pruned.flatten(0, -2)  # of all matrices, one below the other
        blocks = None
        if isinstance(self.grid, BlockGrid):
            found = self.grid.quantize(pruned)
            pruned, blocks = mark_kept(found.values, mask), found.encode()
        elif self.grid is not None:
            pruned = self.grid.dequantize(*self.grid.quantize(rows)).view(weight.shape)
            # The grid has one zero; a kept weight that rounded to it must stay kept.
            pruned = mark_kept(pruned, mask)
        elif self.bits:
            pruned = nearest_rows(rows).view(weight.shape)
        return Solution(weight=pruned, mask=mask, error=None, blocks=blocks)

    def working_bytes(self, shape: tuple[int, int]) -> int:
        """Copies of the weight in float32: three, and two more of what is rounded."""
        return (5 if self.bits else 3) * float32_bytes(shape)
