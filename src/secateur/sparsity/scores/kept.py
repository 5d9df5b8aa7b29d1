"""Kept: prunes exactly the weights that are already zero."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from secateur.sparsity.scores import ScoreDefaults, scores
from secateur.types import Score, Statistics, Weight


@scores.register("kept")
@dataclass(frozen=True)
class Kept(ScoreDefaults):
    """S_ij = 1 where the stored weight is not zero, ½ where it is −0, else 0; float32 [out, in].

    For solvers that improve or round a pruned model: at the present sparsity of a matrix, its own
    zeros are the mask. It reads `stored`, the weight from the file, because the weight to solve may
    have been fitted and then has no zeros. A kept weight that rounded to 0 is −0 in the file; where
    fewer weights are to be pruned than are zero, these stay.

    Example:
        >>> import torch
        >>> from secateur.sparsity.scores.kept import Kept
        >>> weight = torch.tensor([[3.0, 0.0, -1.0]])
        >>> Kept()(weight, {"stored": weight})
        tensor([[1., 0., 1.]])
    """

    requires: ClassVar[frozenset[str]] = frozenset({"stored"})

    def __call__(self, weight: Weight, statistics: Statistics) -> Score:
        """Score a weight [out, in] of any floating dtype."""
        stored = statistics["stored"]
        return (stored != 0).float().masked_fill_((stored == 0) & stored.signbit(), 0.5)
