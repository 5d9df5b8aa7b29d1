"""A linear whose weight stays in the bitmask format on a GPU, and whether that is faster there."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import takewhile
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from secateur.errors import ShapeError
from secateur.quantization.activations import round_activations
from secateur.runtime.kernels.gpu.bitmask_kernel import TOKENS
from secateur.runtime.kernels.gpu.matrix import GpuMatrix
from secateur.runtime.kernels.gpu.timing import Call, Clock, race
from secateur.runtime.operator import numbered

TRIED = (1, 2, 4, 8, TOKENS)


class GpuLinear(nn.Module):
    """y = x Wᵀ + b, with W in the bitmask format; for inference.

    Args:
        matrix: W [out, in].
        bias: b [out], or None.
        kernel_up_to: the most tokens for the kernel. For more, W is expanded and torch multiplies.
        rounds_inputs: whether activations are rounded as on the CPU; products are then float32.
    """

    def __init__(
        self,
        matrix: GpuMatrix,
        bias: Tensor | None = None,
        kernel_up_to: int = TOKENS,
        *,
        rounds_inputs: bool = False,
    ) -> None:
        super().__init__()
        self.matrix, self.kernel_up_to, self.rounds_inputs = matrix, kernel_up_to, rounds_inputs
        self.out_features, self.in_features = matrix.shape
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
        self.number = numbered(self)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Give a copy its own number."""
        super().__setstate__(state)
        self.number = numbered(self)

    def forward(self, x: Tensor) -> Tensor:
        """The product for activations [..., in].

        Raises:
            ShapeError: the activations do not fit.
        """
        if x.shape[-1] != self.in_features:
            raise ShapeError(f"x {list(x.shape)} for a linear of {self.in_features} inputs")
        tokens = x.reshape(-1, self.in_features)
        y: Tensor = torch.ops.secateur.linear(tokens, self.number, self.out_features)
        if self.bias is not None:
            y = y + self.bias.to(y.dtype)
        return y.view(*x.shape[:-1], self.out_features)

    def product(self, x: Tensor) -> Tensor:
        """The product x Wᵀ [tokens, out] without the bias, by the faster way."""
        if len(x) == 0:
            return x.new_empty(0, self.out_features)
        if self.rounds_inputs:
            return self.exact_product(round_activations(x)).to(x.dtype)
        return self.exact_product(x)

    def exact_product(self, x: Tensor) -> Tensor:
        """The product with activations as they are."""
        if len(x) <= self.kernel_up_to:
            return self.matrix.multiply(x)
        return functional.linear(x, self.matrix.dense(x.dtype))

    @property
    def nbytes(self) -> int:
        """The memory of W."""
        return self.matrix.nbytes

    @property
    def weight(self) -> Tensor:
        """Shape without values, for model code that reads it."""
        return torch.empty(self.matrix.shape, device="meta")


@dataclass(frozen=True)
class GpuChoice:
    """How matrices of one kind are multiplied.

    Args:
        kernel_up_to: the most tokens for which the kernel is not slower than expanding.
        gain: for one token, seconds of torch on the dense matrix divided by those of the kernel.
    """

    kernel_up_to: int
    gain: float


def measured(matrix: GpuMatrix, dtype: torch.dtype, clock: Clock | None = None) -> GpuChoice:
    """Time the kernel, expanding, and the dense matrix, in turns.

    Args:
        matrix: one of its kind.
        dtype: of the activations.
        clock: None for the current GPU.
    """
    dense = matrix.dense(dtype)

    def ways(tokens: int) -> dict[str, Call]:
        x = torch.randn(tokens, matrix.shape[1], device=dense.device).to(dtype)
        return {
            "dense": lambda: functional.linear(x, dense),
            "kernel": lambda: matrix.multiply(x),
            "expanded": lambda: functional.linear(x, matrix.dense(dtype)),
        }

    seconds = race(TRIED, "dense", ways, clock)
    wins = takewhile(lambda n: seconds[n]["kernel"] <= seconds[n]["expanded"], TRIED)
    return GpuChoice(max(wins, default=0), seconds[1]["dense"] / seconds[1]["kernel"])
