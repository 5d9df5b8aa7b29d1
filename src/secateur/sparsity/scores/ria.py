"""RIA: how large a weight is within its row and its column, times its input."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from secateur.errors import RecipeError
from secateur.sparsity.scores import ScoreDefaults, scores
from secateur.types import Score, Statistics, Weight, float32_bytes


@scores.register("ria")
@dataclass(frozen=True)
class RIA(ScoreDefaults):
    """S_ij = (|W_ij| / Σ_k |W_kj| + |W_ij| / Σ_k |W_ik|) · ‖X_j‖₂^a, float32 [out, in].

    Paper: Zhang et al. 2024, "Plug-and-Play: An Efficient Post-training Pruning Method for Large
    Language Models", ICLR 2024. Deviation: a row or column of zeros scores 0; the released code
    divides 0 by 0.

    Args:
        a: exponent of the input norm; 0 leaves the inputs out.

    Raises:
        RecipeError: a is negative or no number.

    Example:
        >>> import torch
        >>> from secateur.sparsity.scores.ria import RIA
        >>> weight = torch.tensor([[3.0, -1.0], [1.0, 1.0]])
        >>> RIA()(weight, {"column_norm": torch.tensor([1.0, 4.0])})
        tensor([[1.5000, 1.5000],
                [0.7500, 2.0000]])
    """

    a: float = 0.5
    requires: ClassVar[frozenset[str]] = frozenset({"column_norm"})

    def __post_init__(self) -> None:
        if not 0 <= self.a < float("inf"):
            raise RecipeError(f"a of RIA is {self.a}", remedy="give a number >= 0, usually 0.5")

    def __call__(self, weight: Weight, statistics: Statistics) -> Score:
        """Score a weight [out, in] of any floating dtype; reads `column_norm`, float32 [in]."""
        magnitude = weight.detach().float().abs()
        column_sum, row_sum = magnitude.sum(0, keepdim=True), magnitude.sum(1, keepdim=True)
        relative = magnitude / _one_if_zero(column_sum)
        relative += magnitude / _one_if_zero(row_sum)
        return relative.mul_(statistics["column_norm"].pow(self.a))

    def working_bytes(self, shape: tuple[int, int]) -> int:
        """Four float32 copies of the weight."""
        return 4 * float32_bytes(shape)


def _one_if_zero(sums: Tensor) -> Tensor:
    """Divisors that keep the zeros of an all-zero row or column at 0."""
    return sums.masked_fill(sums == 0, 1.0)
