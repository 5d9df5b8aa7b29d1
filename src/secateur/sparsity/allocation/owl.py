"""OWL: layers whose scores have more outliers are pruned less."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from secateur.registry import Positive
from secateur.sparsity.allocation import AllocationDefaults, DenseLayer, Kept, allocations
from secateur.sparsity.allocation.budget import Granularity


@allocations.register("owl")
@dataclass(frozen=True)
class OWL(AllocationDefaults):
    """Outlier weighed layer-wise sparsity.

    With the scores A_ij = |W_ij| · ‖X_j‖₂ / √T of all linears of decoder layer l taken together,
    T the tokens that a linear sees,

        D_l = share of A above M · mean(A)
        r_l = (D_l − min D) / (max D − min D) · 2λ
        s_l = s − (r_l − mean r)

    so that all linears of a layer have one sparsity, and those of all layers lie within 2λ.
    √T is the same for all linears of a dense layer and cancels there. In a mixture experts see only
    the tokens that are sent to them; without it attention, which sees all, would be full of
    outliers, the more so the less evenly tokens are spread.

    Paper: Yin et al. 2023, "Outlier Weighed Layerwise Sparsity (OWL): A Missing Secret Sauce for
    Pruning LLMs to High Sparsity", arXiv:2310.05175. Deviations: the mean over layers is weighted
    by their weights, so that the number of zeros is exact (the same for layers of one size); the
    paper treats no mixtures and has no √T; D is a share, not a percentage, which cancels; equal
    layers stay uniform, where the released code divides by zero; linears that do not compete
    (excluded, or with their own sparsity) are ignored.

    Args:
        outlier_multiple: M, above 0.
        half_range: λ, from 0 up to below 0.5. The paper uses 0.08 for 70 % sparsity.

    Raises:
        RecipeError: a parameter is out of range.
    """

    outlier_multiple: Positive = 5.0
    half_range: Annotated[float, Field(ge=0, lt=0.5)] = 0.08
    requires: ClassVar[frozenset[str]] = frozenset({"column_norm"})

    @property
    def reach(self) -> float:
        """2λ."""
        return 2 * self.half_range

    def observe(self, layer: DenseLayer) -> dict[str, Tensor]:
        """D_l of the layer, float64 [], for each of its linears; scores are made twice, in turn."""
        if not layer.weights:
            return {}
        # Twice, because the mean of all must be known before any outlier; no scores are kept.
        total, count, outliers = 0.0, 0, 0
        for name in layer.weights:
            score = self.score(layer, name)
            total += float(score.sum(dtype=torch.float64))
            count += score.numel()
        for name in layer.weights:
            above = self.score(layer, name) > self.outlier_multiple * total / count
            outliers += int(torch.count_nonzero(above))
        share = torch.tensor(outliers / count, dtype=torch.float64)
        return {name: share.clone() for name in layer.weights}

    def score(self, layer: DenseLayer, name: str) -> Tensor:
        """|W_ij| · ‖X_j‖₂ · √(largest T of the layer / T), float32 [out, in]."""
        # Relative to the linear with most tokens, so that a dense layer multiplies by exactly 1.
        most = max(layer.tokens[other] for other in layer.weights)
        norm = layer.statistics[name]["column_norm"] * math.sqrt(most / layer.tokens[name])
        return layer.weights[name].float().abs() * norm

    def allocate(
        self, kept: Kept, grains: Mapping[str, Granularity], sparsity: float
    ) -> dict[str, float]:
        """S − (r_l − mean r), the mean weighted by weights."""
        shares = {name: float(share) for name, share in kept()}
        least, most = min(shares.values()), max(shares.values())
        if most == least:  # r_l would be 0 / 0
            return dict.fromkeys(shares, sparsity)
        # Every linear of a layer has the same D, so the formula for layers serves for linears.
        r = {n: (d - least) / (most - least) * 2 * self.half_range for n, d in shares.items()}
        total = sum(grain.total for grain in grains.values())
        # Weighted by size: removed weights, not sparsities, must add up to the budget.
        mean = sum(r[name] * grain.total for name, grain in grains.items()) / total
        return {name: sparsity - (value - mean) for name, value in r.items()}

    def working_bytes(self, weights: int, itemsize: int) -> int:
        """Three float32 copies of one linear, which is a third of its layer at most."""
        return 4 * weights
