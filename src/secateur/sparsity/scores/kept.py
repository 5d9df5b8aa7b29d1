"""Kept: prunes exactly the weights that are already zero."""

from secateur.sparsity.scores import score
from secateur.types import Score, Statistics, Weight


@score(requires={"stored"}, batched=True)
def kept(weight: Weight, statistics: Statistics) -> Score:
    """S_ij = 1 where the stored weight is not zero, ½ where it is −0, else 0; float32 [out, in].

    For solvers that improve or round a pruned model: at the present sparsity of a matrix, its own
    zeros are the mask. It reads `stored`, the weight from the file, because the weight to solve may
    have been fitted and then has no zeros. A kept weight that rounded to 0 is −0 in the file; where
    fewer weights are to be pruned than are zero, these stay.

    Example:
        >>> import torch
        >>> from secateur.sparsity.scores.kept import kept
        >>> weight = torch.tensor([[3.0, 0.0, -1.0]])
        >>> kept(weight, {"stored": weight})
        tensor([[1., 0., 1.]])
    """
    stored = statistics["stored"]
    # 0 == −0, so the sign tells a kept weight that rounded to 0 from a pruned one.
    return (stored != 0).float().masked_fill_((stored == 0) & stored.signbit(), 0.5)
