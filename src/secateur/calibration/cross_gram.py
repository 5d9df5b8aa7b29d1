"""Second moments between the inputs that a linear has in the dense and in the pruned model."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

__all__ = ["CrossGram"]


class CrossGram:
    """C = Σ_t x_t x̂_tᵀ, float32 [in, in]: x_t in the dense model, x̂_t in the pruned one.

    Args:
        in_features: the number of input features.
        device: where the sums are kept and computed.
    """

    def __init__(self, in_features: int, device: torch.device | str = "cpu") -> None:
        self.total = torch.zeros(in_features, in_features, device=device)

    def update(self, dense: Float[Tensor, "tokens in"], pruned: Float[Tensor, "tokens in"]) -> None:
        """Add the inputs of the same tokens; multiplied and summed in float32."""
        self.total.addmm_(dense.detach().float().t(), pruned.detach().float())

    def value(self) -> Float[Tensor, "in in"]:
        """The running sum itself, not a copy."""
        return self.total
