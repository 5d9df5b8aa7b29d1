"""A linear layer whose weight stays in the bitmask format on a GPU, where that is faster.

A race measures which of several ways to multiply is the fastest, for how many tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import takewhile
from statistics import median

import torch
from torch import Tensor
from torch.nn import functional

from secateur.quantization.activations import round_activations, shares_of
from secateur.runtime.kernels.dispatch import KernelChoice
from secateur.runtime.kernels.gpu.bitmask_kernel import TOKENS
from secateur.runtime.kernels.gpu.matrix import GpuMatrix
from secateur.runtime.kernels.linear import OperatorLinear
from secateur.timing import alternate

TRIED = (1, 2, 4, 8, TOKENS)


class GpuLinear(OperatorLinear):
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
        super().__init__(matrix.shape, bias)
        self.matrix, self.kernel_up_to, self.rounds_inputs = matrix, kernel_up_to, rounds_inputs

    def product(self, x: Tensor) -> Tensor:
        """The product x Wᵀ [tokens, out] without the bias, by the faster way."""
        if len(x) == 0:
            return x.new_empty(0, self.out_features)
        if self.rounds_inputs:
            rounded = round_activations(x, shares_of(self.matrix.group))
            return self.exact_product(rounded).to(x.dtype)
        return self.exact_product(x)

    def exact_product(self, x: Tensor) -> Tensor:
        """The product with activations as they are."""
        with torch.cuda.device_of(x):  # Triton launches on the current GPU
            if len(x) <= self.kernel_up_to:
                return self.matrix.multiply(x)
            return functional.linear(x, self.matrix.dense(x.dtype))

    @property
    def nbytes(self) -> int:
        """The memory of W."""
        return self.matrix.nbytes


def measured(matrix: GpuMatrix, dtype: torch.dtype, clock: Clock | None = None) -> KernelChoice:
    """Time the kernel, expanding, and the dense matrix, in turns.

    Args:
        matrix: one of its kind.
        dtype: of the activations.
        clock: None for the current GPU.
    """
    dense = matrix.dense(dtype)

    def calls(tokens: int) -> dict[str, Call]:
        x = torch.randn(tokens, matrix.shape[1], device=dense.device).to(dtype)
        return {
            "dense": lambda: functional.linear(x, dense),
            "kernel": lambda: matrix.multiply(x),
            "expanded": lambda: functional.linear(x, matrix.dense(dtype)),
        }

    seconds = race(TRIED, calls, clock)
    # up to the first number of tokens at which expanding wins; beyond it, it wins the more
    wins = takewhile(lambda n: seconds[n]["kernel"] <= seconds[n]["expanded"], TRIED)
    return KernelChoice(max(wins, default=0), seconds[1]["dense"] / seconds[1]["kernel"])


REPEATS = 11
FILLS = 4
"""How often the cache is filled: for longer than Python takes to launch a call."""

Call = Callable[[], object]
Clock = Callable[[Sequence[Call]], list[float]]
"""Gives the seconds of some calls."""


def race(
    tried: Sequence[int],
    calls: Callable[[int], Mapping[str, Call]],
    clock: Clock | None = None,
) -> dict[int, dict[str, float]]:
    """Seconds of every call, for each number of tokens.

    Args:
        tried: numbers of tokens.
        calls: the calls for a number of tokens, by name.
        clock: None for the current GPU.
    """
    found = {}
    for tokens in tried:
        able = calls(tokens)
        for call in able.values():
            call()  # compiles what it needs
        found[tokens] = dict(zip(able, (clock or _gpu_seconds)([*able.values()]), strict=True))
    return found


def _gpu_seconds(calls: Sequence[Call]) -> list[float]:
    """The median seconds of each call on the current GPU, the calls in turns.

    Before each call the second cache is filled with other numbers, because a model that decodes
    finds no weight there. The GPU is busy with that while Python launches the call, so the time of
    launching does not count.
    """
    size = torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size
    other = torch.empty(max(4 * size, 2**28), dtype=torch.uint8, device="cuda")

    def events(call: Call) -> tuple[torch.cuda.Event, torch.cuda.Event]:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        for _ in range(FILLS):
            other.zero_()
        begin.record()
        call()
        end.record()
        return begin, end

    def median_seconds(pairs: list[tuple[torch.cuda.Event, torch.cuda.Event]]) -> float:
        torch.cuda.synchronize()  # only when all were launched
        return median(begin.elapsed_time(end) / 1000 for begin, end in pairs)

    return alternate(calls, events, median_seconds, turns=REPEATS)
