"""Activation: units with the least energy are removed first."""

from secateur.registry import float32_bytes
from secateur.sparsity.scores import score
from secateur.types import Score, Statistics, Weight


@score(requires={"column_norm"}, working_bytes=float32_bytes, batched=True)
def activation(weight: Weight, statistics: Statistics) -> Score:
    """S_ij = ‖X_j‖₂² / out, float32 [out, in]; the weights are not read.

    Meant for whole columns: summed over the rows and columns of a unit U it is ‖X_U‖²_F, the
    energy of a neuron, or of the outputs of a KV group's heads.

    Paper: Muralidharan et al. 2024, "Compact Language Models via Pruning and Knowledge
    Distillation" (Minitron), arXiv:2407.14679, whose importance of neurons and heads is a norm of
    their activations. Deviation: one norm over all tokens, where the released code takes the mean
    of |x| over a sequence, then the norm over sequences.

    Example:
        >>> import torch
        >>> from secateur.sparsity.scores.activation import activation
        >>> activation(torch.zeros(2, 3), {"column_norm": torch.tensor([1.0, 2.0, 3.0])})
        tensor([[0.5000, 2.0000, 4.5000],
                [0.5000, 2.0000, 4.5000]])
    """
    # One row for all outputs; summed over them it is the energy again.
    energy = statistics["column_norm"].square() / weight.shape[-2]
    return energy[..., None, :].expand(weight.shape).clone()
