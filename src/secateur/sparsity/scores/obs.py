"""Optimal Brain Surgeon: the output error without a weight, if the others compensate."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from secateur.sparsity.hessian import FACTOR_SQUARES, check_damping, inverse_factor
from secateur.sparsity.scores import ScoreDefaults, scores
from secateur.types import Score, Statistics, Weight, float32_bytes


@scores.register("obs")
@dataclass(frozen=True)
class OBSScore(ScoreDefaults):
    """S_ij = W_ij² / [H⁻¹]_jj with H = gram + damping · mean(diag(gram)) · I, float32 [out, in].

    The score holds for removing one weight and re-optimising all others of its row. Columns whose
    inputs were always zero score 0, since SparseGPT sets their weights to zero.

    Paper: Hassibi et al. 1993, "Optimal Brain Surgeon and General Network Pruning", with the
    layer-wise Hessian of Frantar and Alistarh 2022, "Optimal Brain Compression",
    arXiv:2208.11580.

    Args:
        damping: fraction of the mean diagonal of the gram added to its diagonal.

    Raises:
        RecipeError: the damping is negative or no number.

    Example:
        >>> import torch
        >>> from secateur.sparsity.scores.obs import OBSScore
        >>> gram = torch.tensor([[2.0, 1.0], [1.0, 2.0]])
        >>> OBSScore(damping=0.0)(torch.tensor([[1.0, 2.0]]), {"gram": gram})
        tensor([[1.5000, 6.0000]])
    """

    damping: float = 0.01
    requires: ClassVar[frozenset[str]] = frozenset({"gram"})

    def __post_init__(self) -> None:
        check_damping(self.damping)

    def __call__(self, weight: Weight, statistics: Statistics) -> Score:
        """Score a weight [out, in] of any floating dtype; reads `gram`, float32 [in, in].

        Raises:
            NumericalError: the damped gram cannot be factorised.
        """
        factor, dead = inverse_factor(statistics["gram"], self.damping)
        inverse_diagonal = factor.square().sum(0)  # H⁻¹ = UᵀU
        score = weight.detach().float().square().div_(inverse_diagonal)
        return score.masked_fill_(dead, 0.0)

    def working_bytes(self, shape: tuple[int, int]) -> int:
        """Two float32 copies of the weight, and the matrices of the factorisation."""
        return 2 * float32_bytes(shape) + FACTOR_SQUARES * float32_bytes((shape[1], shape[1]))
