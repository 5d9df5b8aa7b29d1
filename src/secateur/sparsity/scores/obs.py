"""Optimal Brain Surgeon: the output error without a weight, if the others compensate."""

from secateur.registry import NonNegative, float32_bytes
from secateur.sparsity.hessian import FACTOR_SQUARES, inverse_factor
from secateur.sparsity.scores import score
from secateur.types import Score, Statistics, Weight


def _working_bytes(shape: tuple[int, int]) -> int:
    """Two copies of the weight, and the matrices of the factorisation."""
    return 2 * float32_bytes(shape) + FACTOR_SQUARES * float32_bytes((shape[1], shape[1]))


@score(requires={"gram"}, working_bytes=_working_bytes, batched=True)
def obs(weight: Weight, statistics: Statistics, *, damping: NonNegative = 0.01) -> Score:
    """S_ij = W_ij² / [H⁻¹]_jj with H = gram + damping · mean(diag(gram)) · I, float32 [out, in].

    It is the smallest possible increase of ‖(W − Ŵ)X‖² (damped) over all Ŵ with Ŵ_ij = 0: one
    weight goes, all others of its row are optimised again. Columns whose inputs were always zero
    score 0, since SparseGPT sets their weights to zero.

    Paper: Hassibi et al. 1993, "Optimal Brain Surgeon and General Network Pruning", with the
    layer-wise Hessian of Frantar and Alistarh 2022, "Optimal Brain Compression",
    arXiv:2208.11580. Deviations: all scores are those of the dense matrix, where the paper removes
    one weight at a time and computes them anew; a gram that float64 cannot factorise either is an
    error, and never becomes the identity.

    Args:
        weight: [out, in], any floating dtype.
        statistics: with `gram`, float32 [in, in].
        damping: fraction of the mean diagonal of the gram added to its diagonal.

    Raises:
        NumericalError: the damped gram cannot be factorised.

    Example:
        >>> import torch
        >>> from secateur.sparsity.scores.obs import obs
        >>> gram = torch.tensor([[2.0, 1.0], [1.0, 2.0]])
        >>> obs(torch.tensor([[1.0, 2.0]]), {"gram": gram}, damping=0.0)
        tensor([[1.5000, 6.0000]])
    """
    factor, dead = inverse_factor(statistics["gram"], damping)
    inverse_diagonal = factor.square().sum(-2)  # H⁻¹ = UᵀU
    importance = weight.detach().float().square().div_(inverse_diagonal[..., None, :])
    return importance.masked_fill_(dead[..., None, :], 0.0)
