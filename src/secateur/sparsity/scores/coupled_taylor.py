"""Coupled Taylor: the first-order change of the loss if a whole unit is removed."""

from secateur.sparsity.scores import score
from secateur.types import Score, Statistics, Weight


@score(requires={"gradient"}, whole_units=True, batched=True)
def coupled_taylor(weight: Weight, statistics: Statistics) -> Score:
    """S_ij = W_ij · ∂L/∂W_ij with its sign, float32 [out, in]; L is the mean calibration loss.

    Whole columns take |Σ_U S| of a unit U. For the columns that read a unit, Σ_U W · ∂L/∂W is the
    derivative of the loss by a gate ξ on the unit's output at ξ = 1: contributions of single
    weights that cancel do not count; with `taylor` they do.

    Papers: Ma et al. 2023, "LLM-Pruner", arXiv:2305.11627, whose group score is a sum over the
    coupled structures; Michel et al. 2019, "Are Sixteen Heads Really Better than One?",
    arXiv:1905.10650, for heads. Deviations: only the weights that read the unit count (the gate is
    the same from both sides). The gradient is that of the mean loss; Michel et al. average the
    absolute values of single texts.

    Example:
        >>> import torch
        >>> from secateur.sparsity.scores.coupled_taylor import coupled_taylor
        >>> coupled_taylor(torch.tensor([[3.0, -1.0]]), {"gradient": torch.tensor([[0.5, 2.0]])})
        tensor([[ 1.5000, -2.0000]])
    """
    # No absolute value: the pattern takes it of the sum over a unit.
    return weight.detach().float() * statistics["gradient"]
