"""Fit the dense model's outputs, not the weight's own, from the inputs of the pruned model."""

from __future__ import annotations

import torch
from jaxtyping import Float32
from torch import Tensor

from secateur.sparsity.hessian import damped_diagonal
from secateur.types import Gram

__all__ = ["dense_target"]


def dense_target(
    gram: Gram, cross: Float32[Tensor, "in in"], damping: float
) -> Float32[Tensor, "in in"]:
    """The matrix K by which a dense weight becomes the one that is to be pruned: W* = WK.

    Inputs X̂ in the pruned model differ from the inputs X of the dense one. A solver that is to
    keep WX, not WX̂, minimises ‖WX − ŴX̂‖². With G = X̂X̂ᵀ, C = XX̂ᵀ and λ = damping · mean(diag G)

        K = (C + λI)(G + λI)⁻¹,    ‖WX − ŴX̂‖² + λ‖W − Ŵ‖² = tr((Ŵ − W*)(G + λI)(Ŵ − W*)ᵀ) + rest

    where the rest does not depend on Ŵ. So every score and solver can do its work on W* as if it
    were the weight. K is the identity where X̂ = X, and is shared by linears with the same input.

    Paper: Li et al. 2025, "GPTAQ: Efficient Finetuning-Free Quantization for Asymmetric
    Calibration", arXiv:2504.02692, where the same target is used in the column sweep of
    quantization; here it is solved for at once, and pulled towards W by the damping.

    Args:
        gram: G = X̂X̂ᵀ, float32 [in, in].
        cross: C = XX̂ᵀ, float32 [in, in], rows of the dense model.
        damping: fraction of the mean diagonal of the gram.

    Raises:
        NumericalError: the gram is not finite, or is zero everywhere.
    """
    damped, dead = damped_diagonal(gram, damping)
    shift = torch.where(dead, damped, damping * gram.diagonal().mean())
    hessian = gram.clone()
    hessian.diagonal().copy_(damped)
    wanted = cross.clone()
    wanted.diagonal().add_(shift)
    solved: Tensor = torch.linalg.solve(hessian, wanted.t())
    return solved.t().contiguous()
