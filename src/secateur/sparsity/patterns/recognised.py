"""Which pattern the zeros of a matrix follow, seen from the zeros alone."""

from __future__ import annotations

from secateur.types import Weight

DENSE, UNSTRUCTURED = "dense", "unstructured"
BY_CHANCE = 0.001
"""The share of zeros that a dense matrix may have by chance."""
EXPLAINED = 0.8
"""The share of the zeros that N:M must account for. Many zeros anywhere also leave some in every
group, but the N:M that they fulfil accounts for few of them."""
GROUPS = (4, 8, 16, 32)
FEWEST = 4
"""Groups in a row; with fewer, rows with equal numbers of zeros would look like N:M."""


def recognised(weight: Weight) -> str:
    """Return `N:M`, `unstructured` or `dense` for a matrix [out, in].

    N:M means that no group of M consecutive inputs keeps more than N weights, and that this alone
    makes at least 4 of 5 zeros; a row has at least 4 groups. Of several, it is the one with the
    most zeros, then the smallest M.

    Example:
        >>> import torch
        >>> from secateur.sparsity.patterns.recognised import recognised
        >>> recognised(torch.tensor([[1.0, 0, 0, 2] * 4, [0, 3, 4, 0] * 4]))
        '2:4'
        >>> recognised(torch.tensor([[1.0, 0, 0, 0] * 4, [2, 3, 4, 0] * 4]))
        'unstructured'
    """
    kept = weight != 0
    sparsity = 1 - float(kept.float().mean())
    if sparsity < BY_CHANCE:
        return DENSE
    best, name = 0.0, UNSTRUCTURED
    for size in GROUPS:
        if weight.shape[1] % size or weight.shape[1] < FEWEST * size:
            continue
        most = int(kept.reshape(-1, size).sum(-1).max())
        zeros = 1 - most / size
        if zeros > best and zeros >= EXPLAINED * sparsity:
            best, name = zeros, f"{most}:{size}"
    return name
