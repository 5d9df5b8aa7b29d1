"""Divergence: a linear that changes the model's predictions more is pruned less."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, ClassVar

from pydantic import Field
from torch import Tensor

from secateur.registry import Count, Positive
from secateur.sparsity.allocation import AllocationDefaults, DenseLayer, Kept, allocations
from secateur.sparsity.allocation.budget import Granularity

_LEAST = 1e-6  # of the largest divergence of a weight: what is below is noise


@allocations.register("divergence")
@dataclass(frozen=True)
class ByDivergence(AllocationDefaults):
    """Sparsity falls with the logarithm of the divergence that pruning one linear alone makes.

    Each linear i of the dense model is pruned to the target s, alone. With

        D_i ≈ mean over tokens of KL( softmax(dense logits) ‖ softmax(logits with linear i pruned) )

    to second order (`engine.search.sensitivity.ChangedAlone`), and n_i weights in linear i,

        s_i = c − ln(D_i / n_i) / growth        |s_i − s| ≤ reach

    Derivation: near the target D_i grows with the sparsity like exp(growth · s_i), and small
    divergences of single linears add up. Then Σ D_i is smallest at a given Σ n_i s_i where the
    slopes of all linears are equal, growth · D_i exp(growth · (s_i − s)) / n_i; this is the
    formula. `growth` is measured: 8 to 9 on small Gemmas and Qwens between 60 and 80 %.

    Args:
        growth: how fast a divergence grows with the sparsity.
        reach: how far the sparsity of a linear may differ from the target, from 0 to 1.
        judged_tokens: calibration tokens on which the linears are pruned, and D_i is measured.

    Raises:
        RecipeError: a parameter is out of range.
    """

    growth: Positive = 9.0
    reach: Annotated[float, Field(gt=0, le=1)] = 0.15
    judged_tokens: Count = 4096
    uses: ClassVar[frozenset[str]] = frozenset({"score", "solver"})

    def observe(self, layer: DenseLayer) -> dict[str, Tensor]:
        """The weight of each linear, pruned to the target (`name/1`)."""
        grains = layer.grains
        uniform = {name: grains[name].uniform / grains[name].units for name in layer.weights}
        pruned = layer.solve_all(uniform, quick=True)
        return {f"{name}/1": weight for name, weight in pruned.items()}

    def allocate(
        self, kept: Kept, grains: Mapping[str, Granularity], sparsity: float
    ) -> dict[str, float]:
        """The sparsity of each linear, up to the same shift of all, which `settle` finds.

        Args:
            kept: D_i / n_i of each linear.
            grains: of every linear that competes.
            sparsity: the target.

        Example:
            >>> import torch
            >>> from secateur.sparsity.allocation.divergence import ByDivergence
            >>> kept = {"q_proj": torch.tensor(1e-7), "k_proj": torch.tensor(2e-7)}
            >>> shares = ByDivergence().allocate(kept.items, {}, 0.5)
            >>> {name: round(share, 3) for name, share in shares.items()}
            {'q_proj': 0.539, 'k_proj': 0.461}
        """
        slopes = {name: float(slope) for name, slope in kept()}
        # No logarithm of 0: what is below the noise counts as the noise. All 0 is uniform.
        least = max(_LEAST * max(slopes.values()), 0.0) or 1.0
        wished = {n: -math.log(max(slope, least)) / self.growth for n, slope in slopes.items()}
        mean = sum(wished.values()) / len(wished)
        # `settle` shifts all by one number, so any mean would do; this one is near the answer.
        return {name: sparsity + wish - mean for name, wish in wished.items()}

    def working_bytes(self, weights: int, itemsize: int) -> int:
        """A layer's pruned weights, and what they differ by."""
        return 2 * weights * itemsize

    def tokens(self, calibration: int, linears: int) -> int:
        """Two forwards, one forward with its backward, and one more product for each linear."""
        return 6 * self.judged_tokens
