"""The least layer-wise error for a given mask, by conjugate gradients for all rows at once."""

from __future__ import annotations

from torch import Tensor

from secateur.types import Mask

_TINY = 1e-30


def fit_on_mask(start: Tensor, target: Tensor, hessian: Tensor, mask: Mask, steps: int) -> Tensor:
    """Approach argmin tr((X − B) A (X − B)ᵀ), X = 0 where pruned; rows that are solved do not move.

    Args:
        start: first X, float32 [out, in], zero where pruned; changed in place and returned.
        target: B A, float32 [out, in].
        hessian: A, float32 [in, in]; converges soonest where its diagonal is 1.
        mask: True = kept, bool [out, in].
        steps: of conjugate gradients.
    """
    x = start
    residual = (target - x @ hessian) * mask
    direction = residual.clone()
    energy = residual.square().sum(1, keepdim=True)
    for _ in range(steps):
        image = (direction @ hessian) * mask
        length = energy / (direction * image).sum(1, keepdim=True).clamp_min_(_TINY)
        x.addcmul_(direction, length)
        residual.addcmul_(image, length, value=-1)
        left = residual.square().sum(1, keepdim=True)
        direction = direction.mul_(left / energy.clamp_min(_TINY)).add_(residual)
        energy = left
    return x
