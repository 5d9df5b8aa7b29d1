"""Magnitude: small weights matter least."""

from secateur.sparsity.scores import score
from secateur.types import Score, Statistics, Weight


@score(batched=True)
def magnitude(weight: Weight, statistics: Statistics) -> Score:
    """S_ij = |W_ij|, float32 [out, in]; needs no calibration.

    Paper: Han et al. 2015, "Learning both Weights and Connections for Efficient Neural
    Networks", arXiv:1506.02626. Deviation: the number of zeros is exact, also where many weights
    are equal (bfloat16 has few different values): of equal weights the one with the lower index
    goes first. Released code prunes all up to a threshold, and so too much.

    Example:
        >>> import torch
        >>> from secateur.sparsity.scores.magnitude import magnitude
        >>> magnitude(torch.tensor([[3.0, -1.0]]), {})
        tensor([[3., 1.]])
    """
    return weight.detach().float().abs()
