"""The norm of each input feature over all calibration tokens."""

from __future__ import annotations

from jaxtyping import Float, Float32
from torch import Tensor

from secateur.calibration.statistics import ColumnSums, Stacked, check_finite, statistics

# On the CPU, tokens are squared in chunks of about this many numbers: small enough to stay in a
# core's cache and to be allocated without new pages from the system. 0.4 ns a number, where one
# pass over [2048, 1536] takes 2 ns and vector_norm over the first axis 4 ns.
_CHUNK = 2**15


@statistics.register("column_norm")
class ColumnNorm(ColumnSums, Stacked):
    """‖X_j‖₂ = sqrt(Σ_t x_tj²), float32 [in].

    Tokens are squared and summed in float32, a chunk at a time, and the sums of chunks in float64.
    So the order of the chunks, and how many processes have gathered them, does not change it.

    If the gram is gathered anyway, this is the square root of its diagonal.

    Example:
        >>> import torch
        >>> from secateur.calibration.statistics.column_norm import ColumnNorm
        >>> norm = ColumnNorm((1, 2))
        >>> norm.update(torch.tensor([[3.0, 1.0]]))
        >>> norm.update(torch.tensor([[4.0, 0.0]]))
        >>> norm.value()
        tensor([5., 1.])
    """

    def update(self, x: Float[Tensor, "*linears tokens in"]) -> None:
        """Add the inputs of more tokens, [tokens, in]."""
        tokens = max(1, _CHUNK // x.shape[-1] if x.device.type == "cpu" else x.shape[-2])
        for chunk in x.detach().split(tokens, -2):
            inputs = chunk.float()
            self.total[..., 0, :] += (inputs * inputs).sum(-2)

    def value(self) -> Float32[Tensor, "*linears in"]:
        """‖X_j‖₂ of every input feature, float32 [in].

        Raises:
            NumericalError: an input was infinite or NaN.
        """
        check_finite(self.total[..., 0, :])
        return self.total[..., 0, :].sqrt().float()
