"""Layer sensitivity: linears whose outputs suffer more from pruning are pruned less."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, ClassVar

from pydantic import Field
from torch import Tensor

from secateur.sparsity.allocation import AllocationDefaults, DenseLayer, Kept, allocations
from secateur.sparsity.allocation.budget import Granularity
from secateur.sparsity.hessian import relative_output_error


@allocations.register("layer-sensitivity")
@dataclass(frozen=True)
class LayerSensitivity(AllocationDefaults):
    """Sparsity falls with the rank of the error that pruning makes.

    Each linear i of the dense model is pruned by the run's own method to a reference sparsity.
    With the relative error of its output on the calibration inputs, E_i = ‖(W − Ŵ)X‖² / ‖WX‖²,
    and its rank among the n linears of the whole model, 0 for the least error,

        s_i = s + β · (1 − 2 · rank_i / (n − 1))

    so that sparsity moves between layers and between the linears of a layer alike.

    Source: the layer-wise sparsity allocation by minimal linear reconstruction error (LSA, ICLR
    2026, with β up to 0.17), rewritten from its description; the authors' code was not seen.
    Deviations: linears are ranked, not whole layers or blocks; the error is that of the run's own
    method and pattern; equal errors share their mean rank; the number of zeros is exact.

    Args:
        half_range: β, from 0 to 0.17.
        reference: the sparsity at which linears are compared.

    Raises:
        RecipeError: a parameter is out of range.
    """

    half_range: Annotated[float, Field(ge=0, le=0.17)] = 0.1
    reference: Annotated[float, Field(gt=0, lt=1)] = 0.5
    requires: ClassVar[frozenset[str]] = frozenset({"gram"})
    uses: ClassVar[frozenset[str]] = frozenset({"score", "solver"})

    @property
    def reach(self) -> float:
        """β."""
        return self.half_range

    def observe(self, layer: DenseLayer) -> dict[str, Tensor]:
        """E_i of each linear, float64 []."""
        return {
            name: relative_output_error(
                weight, layer.solve(name, self.reference), layer.statistics[name]["gram"]
            )
            for name, weight in layer.weights.items()
        }

    def allocate(
        self, kept: Kept, grains: Mapping[str, Granularity], sparsity: float
    ) -> dict[str, float]:
        """S + β · (1 − 2 · rank / (n − 1))."""
        errors = {name: float(error) for name, error in kept()}
        last = max(len(errors) - 1, 1)
        if len(errors) == 1:
            return dict.fromkeys(errors, sparsity)
        return {
            name: sparsity + self.half_range * (1 - 2 * rank / last)
            for name, rank in ranks(errors).items()
        }

    def working_bytes(self, weights: int, itemsize: int) -> int:
        """Three float32 copies of one linear, which is a third of its layer at most."""
        return 4 * weights


def ranks(values: Mapping[str, float]) -> dict[str, float]:
    """The rank of each value from 0, ascending; equal values share the mean of their ranks.

    Example:
        >>> from secateur.sparsity.allocation.layer_sensitivity import ranks
        >>> ranks({"q_proj": 0.3, "k_proj": 0.1, "v_proj": 0.3})
        {'q_proj': 1.5, 'k_proj': 0.0, 'v_proj': 1.5}
    """
    equal = Counter(values.values())
    # So the ranks add up to the same, and a tie moves no sparsity in or out.
    rank_of, below = {}, 0
    for value in sorted(equal):
        rank_of[value] = below + (equal[value] - 1) / 2
        below += equal[value]
    return {name: rank_of[value] for name, value in values.items()}
