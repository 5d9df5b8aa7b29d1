"""RIA: how large a weight is within its row and its column, times its input."""

from torch import Tensor

from secateur.registry import NonNegative, float32_bytes
from secateur.sparsity.scores import score
from secateur.types import Score, Statistics, Weight


def _one_if_zero(sums: Tensor) -> Tensor:
    """Divisors that keep the zeros of an all-zero row or column at 0."""
    return sums.masked_fill(sums == 0, 1.0)


@score(requires={"column_norm"}, working_bytes=lambda shape: 4 * float32_bytes(shape), batched=True)
def ria(weight: Weight, statistics: Statistics, *, a: NonNegative = 0.5) -> Score:
    """S_ij = (|W_ij| / Σ_k |W_kj| + |W_ij| / Σ_k |W_ik|) · ‖X_j‖₂^a, float32 [out, in].

    Paper: Zhang et al. 2024, "Plug-and-Play: An Efficient Post-training Pruning Method for Large
    Language Models", ICLR 2024. Deviations: a row or column of zeros scores 0, where the released
    code divides 0 by 0; the exact number of weights is pruned, where the released code prunes all
    up to a threshold; the channel permutation for N:M, the second half of the paper, is no part of
    a score.

    Args:
        weight: [out, in], any floating dtype.
        statistics: with `column_norm`, float32 [in].
        a: exponent of the input norm; 0 leaves the inputs out.

    Example:
        >>> import torch
        >>> from secateur.sparsity.scores.ria import ria
        >>> weight = torch.tensor([[3.0, -1.0], [1.0, 1.0]])
        >>> ria(weight, {"column_norm": torch.tensor([1.0, 4.0])})
        tensor([[1.5000, 1.5000],
                [0.7500, 2.0000]])
    """
    magnitude = weight.detach().float().abs()
    column_sum, row_sum = magnitude.sum(-2, keepdim=True), magnitude.sum(-1, keepdim=True)
    # In two steps, so that no more than four copies of the weight are alive.
    relative = magnitude / _one_if_zero(column_sum)
    relative += magnitude / _one_if_zero(row_sum)
    return relative.mul_(statistics["column_norm"].pow(a)[..., None, :])
