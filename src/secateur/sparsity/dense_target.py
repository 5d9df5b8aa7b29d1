"""Fits the dense model's outputs from the inputs of the pruned model."""

from __future__ import annotations

import torch
from jaxtyping import Float32
from torch import Tensor

from secateur.sparsity.hessian import damped_diagonal
from secateur.types import Gram


def dense_target(
    gram: Gram,
    moments: Float32[Tensor, "out in"],
    anchor: Float32[Tensor, "out in"],
    damping: float,
) -> Float32[Tensor, "out in"]:
    """The weight to prune, so that the outputs for inputs X̂ stay near the targets T.

    With G = X̂X̂ᵀ, M = TX̂ᵀ, λ = damping · mean(diag G) and an anchor A

        W* = (M + λA)(G + λI)⁻¹,    ‖T − ŴX̂‖² + λ‖A − Ŵ‖² = tr((Ŵ − W*)(G + λI)(Ŵ − W*)ᵀ) + rest

    where the rest does not depend on Ŵ. So every score and solver can use W* as the weight. Inputs
    X̂ in the pruned model differ from the inputs X of the dense one:

    * T = X, A = I gives a matrix K with W* = WK for T = WX, shared by linears with the same input;
    * T = WX + H − Ĥ, A = W is for a linear that writes to the residual stream, whose states before
      it are H in the dense and Ĥ in the pruned model: it then also corrects that difference.

    Paper: Li et al. 2025, "GPTAQ: Efficient Finetuning-Free Quantization for Asymmetric
    Calibration", arXiv:2504.02692, which uses the first in the column sweep of quantization; here
    it is solved for at once, and pulled towards the anchor by the damping.

    Args:
        gram: G = X̂X̂ᵀ, float32 [in, in].
        moments: M = TX̂ᵀ, float32 [out, in].
        anchor: A, float32 [out, in], towards which the damping pulls.
        damping: fraction of the mean diagonal of the gram.

    Raises:
        NumericalError: the gram is not finite, or is zero everywhere.

    Example:
        >>> import torch
        >>> from secateur.sparsity.dense_target import dense_target
        >>> weight, x, pruned_x = torch.ones(1, 1), torch.full((1, 1), 2.0), torch.ones(1, 1)
        >>> dense_target(pruned_x @ pruned_x.t(), weight @ x @ pruned_x.t(), weight, damping=0.0)
        tensor([[2.]])
    """
    damped, dead = damped_diagonal(gram, damping)
    shift = torch.where(dead, damped, damping * gram.diagonal().mean())
    hessian = gram.clone()
    hessian.diagonal().copy_(damped)
    target = moments + anchor * shift
    solved: Tensor = torch.linalg.solve(hessian, target.t())
    return solved.t().contiguous()
