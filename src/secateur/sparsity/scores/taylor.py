"""Taylor: the first-order change of the loss without a weight."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from secateur.sparsity.scores import ScoreDefaults, scores
from secateur.types import Score, Statistics, Weight


@scores.register("taylor")
@dataclass(frozen=True)
class Taylor(ScoreDefaults):
    """S_ij = |W_ij · ∂L/∂W_ij|, float32 [out, in]; L is the mean calibration loss.

    Removing w changes the loss by L(0) − L(w) ≈ −w · ∂L/∂w.

    Paper: Molchanov et al. 2017, "Pruning Convolutional Neural Networks for Resource Efficient
    Inference", arXiv:1611.06440, here for single weights. Deviation: the absolute value is taken of
    the gradient of the mean loss, so windows that push a weight in opposite directions cancel; with
    `obd` they do not.

    Example:
        >>> import torch
        >>> from secateur.sparsity.scores.taylor import Taylor
        >>> Taylor()(torch.tensor([[3.0, -1.0]]), {"gradient": torch.tensor([[0.5, 2.0]])})
        tensor([[1.5000, 2.0000]])
    """

    requires: ClassVar[frozenset[str]] = frozenset({"gradient"})

    def __call__(self, weight: Weight, statistics: Statistics) -> Score:
        """Score a weight [out, in] of any floating dtype; reads `gradient`, float32 [out, in]."""
        return (weight.detach().float() * statistics["gradient"]).abs_()
