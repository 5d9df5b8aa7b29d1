"""Magnitude: small weights matter least."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from secateur.sparsity.scores import ScoreDefaults, scores
from secateur.types import Score, Statistics, Weight


@scores.register("magnitude")
@dataclass(frozen=True)
class Magnitude(ScoreDefaults):
    """S_ij = |W_ij|, float32 [out, in]; needs no calibration.

    Paper: Han et al. 2015, "Learning both Weights and Connections for Efficient Neural
    Networks", arXiv:1506.02626.

    Example:
        >>> import torch
        >>> from secateur.sparsity.scores.magnitude import Magnitude
        >>> Magnitude()(torch.tensor([[3.0, -1.0]]), {})
        tensor([[3., 1.]])
    """

    requires: ClassVar[frozenset[str]] = frozenset()

    def __call__(self, weight: Weight, statistics: Statistics) -> Score:
        """Score a weight [out, in] of any floating dtype; the statistics are not read."""
        return weight.detach().float().abs()
