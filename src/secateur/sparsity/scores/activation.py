"""Activation: units with the least energy are removed first."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from secateur.sparsity.scores import ScoreDefaults, scores
from secateur.types import Score, Statistics, Weight, float32_bytes


@scores.register("activation")
@dataclass(frozen=True)
class Activation(ScoreDefaults):
    """S_ij = ‖X_j‖₂² / out, float32 [out, in]; the weights are not read.

    Meant for whole columns: summed over the rows and columns of a unit U it is ‖X_U‖²_F, the
    energy of a neuron, or of the outputs of a KV group's heads.

    Paper: Muralidharan et al. 2024, "Compact Language Models via Pruning and Knowledge
    Distillation" (Minitron), arXiv:2407.14679, whose importance of neurons and heads is a norm of
    their activations. Deviation: one norm over all tokens, where the released code takes the mean
    of |x| over a sequence, then the norm over sequences.

    Example:
        >>> import torch
        >>> from secateur.sparsity.scores.activation import Activation
        >>> Activation()(torch.zeros(2, 3), {"column_norm": torch.tensor([1.0, 2.0, 3.0])})
        tensor([[0.5000, 2.0000, 4.5000],
                [0.5000, 2.0000, 4.5000]])
    """

    requires: ClassVar[frozenset[str]] = frozenset({"column_norm"})

    def __call__(self, weight: Weight, statistics: Statistics) -> Score:
        """Score a weight [out, in]; reads `column_norm`, float32 [in]."""
        energy = statistics["column_norm"].square() / len(weight)
        return energy.expand(len(weight), -1).clone()

    def working_bytes(self, shape: tuple[int, int]) -> int:
        """One float32 copy of the weight."""
        return float32_bytes(shape)
