"""Optimal Brain Damage: the second-order change of the loss without a weight."""

from secateur.sparsity.scores import score
from secateur.types import Score, Statistics, Weight


@score(requires={"fisher"}, batched=True)
def obd(weight: Weight, statistics: Statistics) -> Score:
    """S_ij = ½ · F_ij · W_ij², float32 [out, in].

    F is the empirical Fisher diagonal: the mean over calibration windows of the squared gradient
    of the window's loss. It replaces the diagonal of the loss's Hessian, which OBD uses and which
    is too expensive for a language model. The other cheap Hessian, that of the layer-wise squared
    error, is H_jj = 2‖X_j‖². It gives ½ · H_jj · W_ij² = (|W_ij| · ‖X_j‖)², exactly Wanda squared,
    which is not a new score.

    Paper: LeCun et al. 1989, "Optimal Brain Damage". Deviation: Fisher for Hessian diagonal.

    Example:
        >>> import torch
        >>> from secateur.sparsity.scores.obd import obd
        >>> obd(torch.tensor([[2.0, -1.0]]), {"fisher": torch.tensor([[1.0, 8.0]])})
        tensor([[2., 4.]])
    """
    return weight.detach().float().square().mul_(statistics["fisher"]).mul_(0.5)
