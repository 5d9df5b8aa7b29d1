"""Fluctuation: an input that is nearly constant can be replaced by its mean."""

from secateur.sparsity.scores import score
from secateur.types import Score, Statistics, Weight


@score(requires={"column_variance"}, batched=True)
def fluctuation(weight: Weight, statistics: Statistics) -> Score:
    """S_ij = Var_t(x_tj) · W_ij², float32 [out, in].

    Summed over the rows it is Var(x_j) · ‖W_:j‖². For uncorrelated inputs this is the loss without
    column j, once the bias compensates for its mean (solver `bias`).

    Paper: An et al. 2023, "Fluctuation-based Adaptive Structured Pruning for Large Language
    Models" (FLAP), arXiv:2312.11983. Deviations: a head's columns are summed, not averaged, which
    orders heads of one layer alike; scores are not standardised within a layer, so that FLAP's one
    threshold over standardised scores is not what the allocation `global` does.

    Example:
        >>> import torch
        >>> from secateur.sparsity.scores.fluctuation import fluctuation
        >>> variance = torch.tensor([0.5, 9.0])
        >>> fluctuation(torch.tensor([[3.0, -1.0]]), {"column_variance": variance})
        tensor([[4.5000, 9.0000]])
    """
    return weight.detach().float().square() * statistics["column_variance"][..., None, :]
