"""Second moments between a linear's target outputs and its inputs in the pruned model."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

_ROWS = 512  # the largest float32 product besides the sums


class CrossGram:
    """M = Σ_t y_t x̂_tᵀ, float32 [rows, in]: y_t in the dense model, x̂_t in the pruned one.

    Products are float32 and their sums float64, as in `Gram`.

    Args:
        rows: the size of y, which is inputs or outputs of the linear.
        in_features: the number of input features.
        device: where the sums are kept and computed.
    """

    def __init__(self, rows: int, in_features: int, device: torch.device | str = "cpu") -> None:
        self.total = torch.zeros(rows, in_features, dtype=torch.float64, device=device)

    def update(self, target: Float[Tensor, "tokens rows"], x: Float[Tensor, "tokens in"]) -> None:
        """Add y and x̂ of the same tokens, some rows of y at a time."""
        targets, inputs = target.detach().float(), x.detach().float()
        for columns, sums in zip(targets.split(_ROWS, 1), self.total.split(_ROWS), strict=True):
            sums += columns.t() @ inputs

    def value(self) -> Float[Tensor, "rows in"]:
        """M, float32. It takes the place of the sums."""
        self.total = self.total.float()
        return self.total
