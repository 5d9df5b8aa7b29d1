"""Second moments between a linear's target outputs and its inputs in the pruned model."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

__all__ = ["CrossGram"]


class CrossGram:
    """M = Σ_t y_t x̂_tᵀ, float32 [rows, in]: y_t in the dense model, x̂_t in the pruned one.

    Args:
        rows: the size of y, which is inputs or outputs of the linear.
        in_features: the number of input features.
        device: where the sums are kept and computed.
    """

    def __init__(self, rows: int, in_features: int, device: torch.device | str = "cpu") -> None:
        self.total = torch.zeros(rows, in_features, device=device)

    def update(self, target: Float[Tensor, "tokens rows"], x: Float[Tensor, "tokens in"]) -> None:
        """Add y and x̂ of the same tokens; multiplied and summed in float32."""
        self.total.addmm_(target.detach().float().t(), x.detach().float())

    def value(self) -> Float[Tensor, "rows in"]:
        """The running sum itself, not a copy."""
        return self.total
