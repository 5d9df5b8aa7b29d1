"""Taylor: the first-order change of the loss without a weight."""

from secateur.sparsity.scores import score
from secateur.types import Score, Statistics, Weight


@score(requires={"gradient"}, batched=True)
def taylor(weight: Weight, statistics: Statistics) -> Score:
    """S_ij = |W_ij · ∂L/∂W_ij|, float32 [out, in]; L is the mean calibration loss.

    Removing w changes the loss by L(0) − L(w) ≈ −w · ∂L/∂w.

    Paper: Molchanov et al. 2017, "Pruning Convolutional Neural Networks for Resource Efficient
    Inference", arXiv:1611.06440. Deviations: the paper scores feature maps, here single weights;
    the gradient is that of the dense model and of the mean loss, so windows that push a weight in
    opposite directions cancel; with `obd` they do not.

    Example:
        >>> import torch
        >>> from secateur.sparsity.scores.taylor import taylor
        >>> taylor(torch.tensor([[3.0, -1.0]]), {"gradient": torch.tensor([[0.5, 2.0]])})
        tensor([[1.5000, 2.0000]])
    """
    return (weight.detach().float() * statistics["gradient"]).abs_()
