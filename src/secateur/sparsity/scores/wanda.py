"""Wanda: the weight's magnitude times the norm of its input."""

from secateur.sparsity.scores import score
from secateur.types import Score, Statistics, Weight


@score(requires={"column_norm"}, batched=True)
def wanda(weight: Weight, statistics: Statistics) -> Score:
    """S_ij = |W_ij| · ‖X_j‖₂, float32 [out, in].

    ‖X_j‖₂ = √(Σ_t x_tj²) over all calibration tokens t. Weights compete within an output row.

    Paper: Sun et al. 2023, "A Simple and Effective Pruning Approach for Large Language Models",
    arXiv:2306.11695. Deviations: the released code divides the sum by the number of windows, which
    gives the same order; it rounds the count of a row down, here it is the nearest number.

    Example:
        >>> import torch
        >>> from secateur.sparsity.scores.wanda import wanda
        >>> wanda(torch.tensor([[3.0, -1.0]]), {"column_norm": torch.tensor([1.0, 4.0])})
        tensor([[3., 4.]])
    """
    return weight.detach().float().abs() * statistics["column_norm"][..., None, :]
