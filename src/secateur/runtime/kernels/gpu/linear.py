"""A linear whose weight stays in the bitmask format on a GPU, and whether that is faster there."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median

import torch
from torch import Tensor, nn
from torch.nn import functional

from secateur.errors import ShapeError
from secateur.runtime.kernels.gpu.bitmask_kernel import TOKENS
from secateur.runtime.kernels.gpu.matrix import GpuMatrix

__all__ = ["GpuChoice", "GpuLinear", "measured"]

TRIED = (1, 2, 4, 8, TOKENS)
REPEATS, CALLS = 9, 20


class GpuLinear(nn.Module):
    """y = x Wᵀ + b, with W in the bitmask format; for inference.

    Args:
        matrix: W [out, in].
        bias: b [out], or None.
        kernel_up_to: the most tokens for the kernel. For more, W is expanded and torch multiplies.
    """

    def __init__(
        self, matrix: GpuMatrix, bias: Tensor | None = None, kernel_up_to: int = TOKENS
    ) -> None:
        super().__init__()
        self.matrix, self.kernel_up_to = matrix, kernel_up_to
        self.out_features, self.in_features = matrix.shape
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """The product for activations [..., in].

        Raises:
            ShapeError: the activations do not fit.
        """
        if x.shape[-1] != self.in_features:
            raise ShapeError(f"x {list(x.shape)} for a linear of {self.in_features} inputs")
        tokens = x.reshape(-1, self.in_features)
        if len(tokens) == 0:
            y = x.new_empty(0, self.out_features)
        elif len(tokens) <= self.kernel_up_to:
            y = self.matrix.multiply(tokens)
        else:
            y = functional.linear(tokens, self.matrix.dense(x.dtype))
        if self.bias is not None:
            y = y + self.bias.to(y.dtype)
        return y.view(*x.shape[:-1], self.out_features)

    @property
    def weight(self) -> Tensor:
        """Shape without values, for model code that reads it."""
        return torch.empty(self.matrix.shape, device="meta")


@dataclass(frozen=True)
class GpuChoice:
    """How matrices of one kind are multiplied.

    Args:
        kernel_up_to: the most tokens for which the kernel is faster than expanding.
        gain: for one token, seconds of torch on the dense matrix divided by those of the kernel.
    """

    kernel_up_to: int
    gain: float


def measured(
    matrix: GpuMatrix,
    dtype: torch.dtype,
    time: Callable[[Sequence[Callable[[], object]]], list[float]] | None = None,
) -> GpuChoice:
    """Time the kernel, expanding, and the dense matrix, in turns.

    Args:
        matrix: one of its kind.
        dtype: of the activations.
        time: gives seconds of some calls; None for events of the GPU.
    """
    clock = time or gpu_seconds
    dense, up_to, gain = matrix.dense(dtype), 0, 0.0
    for tokens in TRIED:
        x = torch.randn(tokens, matrix.shape[1], device=dense.device).to(dtype)
        kernel, expanded, plain = clock(
            [
                lambda x=x: matrix.multiply(x),
                lambda x=x: functional.linear(x, matrix.dense(dtype)),
                lambda x=x: functional.linear(x, dense),
            ]
        )
        if tokens == 1:
            gain = plain / kernel
        if kernel > expanded:
            break
        up_to = tokens
    return GpuChoice(up_to, gain)


def gpu_seconds(calls: Sequence[Callable[[], object]]) -> list[float]:
    """The median seconds of each call on the current GPU, over alternating rounds."""
    taken: list[list[float]] = [[] for _ in calls]
    for call in calls:
        call()  # compiles
    for _ in range(REPEATS):
        for own, call in zip(taken, calls, strict=True):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            for _ in range(CALLS):
                call()
            end.record()
            end.synchronize()
            own.append(begin.elapsed_time(end) / 1000 / CALLS)
    return [median(own) for own in taken]
