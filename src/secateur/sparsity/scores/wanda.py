"""Wanda: the weight's magnitude times the norm of its input."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from secateur.sparsity.scores import ScoreDefaults, scores
from secateur.types import Score, Statistics, Weight


@scores.register("wanda")
@dataclass(frozen=True)
class Wanda(ScoreDefaults):
    """S_ij = |W_ij| · ‖X_j‖₂, float32 [out, in].

    ‖X_j‖₂ is taken over all calibration tokens (the sum; the released code takes the mean, which
    gives the same order). The paper compares weights within an output row.

    Paper: Sun et al. 2023, "A Simple and Effective Pruning Approach for Large Language Models",
    arXiv:2306.11695.

    Example:
        >>> import torch
        >>> from secateur.sparsity.scores.wanda import Wanda
        >>> Wanda()(torch.tensor([[3.0, -1.0]]), {"column_norm": torch.tensor([1.0, 4.0])})
        tensor([[3., 4.]])
    """

    requires: ClassVar[frozenset[str]] = frozenset({"column_norm"})

    def __call__(self, weight: Weight, statistics: Statistics) -> Score:
        """Score a weight [out, in] of any floating dtype; reads `column_norm`, float32 [in]."""
        return weight.detach().float().abs() * statistics["column_norm"]
