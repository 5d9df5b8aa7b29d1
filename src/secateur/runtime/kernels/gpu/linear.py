"""A linear layer whose weight stays as it is stored on a GPU, where that is faster.

A race measures which of several ways to multiply is the fastest, for how many tokens.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from itertools import takewhile
from statistics import median
from subprocess import SubprocessError

import torch
from torch import Tensor
from torch.nn import functional
from triton.errors import TritonError

from secateur.runtime.kernels.dispatch import KernelChoice
from secateur.runtime.kernels.gpu.bitmask import TOKENS, GpuBitmask
from secateur.runtime.kernels.gpu.integers import GpuIntegers
from secateur.runtime.kernels.linear import OperatorLinear
from secateur.timing import alternate

TRIED = (1, 2, 4, 8, TOKENS)
TRIED_INTEGERS = (1, TOKENS, 64, 256, 1024)

NOT_RUNNING = (TritonError, RuntimeError, AssertionError, OSError, SubprocessError)
"""Of Triton: its compiler, a GPU that refuses, no driver, no C compiler."""

GpuMatrix = GpuBitmask | GpuIntegers

log = logging.getLogger(__name__)
said: set[str] = set()
"""Why kernels were left out; each reason is logged once."""


class GpuLinear(OperatorLinear):
    """y = x Wᵀ + b, with W as it is stored; for inference.

    Args:
        matrix: W [out, in].
        bias: b [out], or None.
        kernel_up_to: the most tokens for the kernel. For more, W is expanded and torch multiplies.
    """

    def __init__(
        self, matrix: GpuMatrix, bias: Tensor | None = None, kernel_up_to: int = TOKENS
    ) -> None:
        super().__init__(matrix.shape, bias)
        self.matrix, self.kernel_up_to = matrix, kernel_up_to

    @property
    def rounds_inputs(self) -> bool:
        """Whether activations are rounded."""
        return self.matrix.integers

    def product(self, x: Tensor) -> Tensor:
        """The product x Wᵀ [tokens, out] without the bias, by the faster way."""
        if len(x) == 0:
            return x.new_empty(0, self.out_features)
        if len(x) <= self.kernel_up_to:
            return self.matrix.multiply(x)
        return self.matrix.expanded(x)

    @property
    def nbytes(self) -> int:
        """The memory of W."""
        return self.matrix.nbytes


def measured(
    matrix: GpuMatrix, dtype: torch.dtype, device: torch.device, clock: Clock | None = None
) -> KernelChoice:
    """Time the kernel, expanding, and for floats the dense matrix, in turns.

    Integers stay integers, so their speedup over the dense matrix is infinite. The speedup of
    floats is 0 where a kernel does not run.

    Args:
        matrix: one of its kind.
        dtype: of the activations.
        device: where the matrix is.
        clock: None for that GPU.
    """
    tried = TRIED_INTEGERS if matrix.integers else TRIED
    weight = None if matrix.integers else torch.randn(matrix.shape, device=device).to(dtype)

    def calls(tokens: int) -> dict[str, Call]:
        x = torch.randn(tokens, matrix.shape[1], device=device).to(dtype)
        ours: dict[str, Call] = {
            "kernel": lambda: matrix.multiply(x),
            "expanded": lambda: matrix.expanded(x),
        }
        return ours if weight is None else {"dense": lambda: functional.linear(x, weight), **ours}

    with torch.cuda.device_of(torch.empty(0, device=device)):
        seconds = race(tried, calls, clock)
    # up to the first number of tokens at which expanding wins; beyond it, it wins the more
    wins = takewhile(lambda n: seconds[n]["kernel"] <= seconds[n]["expanded"], tried)
    up_to = max((n for n in wins if math.isfinite(seconds[n]["kernel"])), default=0)
    if weight is None:
        return KernelChoice(up_to, math.inf)
    able = all(math.isfinite(taken) for ways in seconds.values() for taken in ways.values())
    return KernelChoice(up_to, seconds[1]["dense"] / seconds[1]["kernel"] if able else 0.0)


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
    """Seconds of every call, for each number of tokens; infinite for those that do not run.

    Args:
        tried: numbers of tokens.
        calls: the calls for a number of tokens, by name.
        clock: None for the current GPU.
    """
    found = {}
    for tokens in tried:
        ways = calls(tokens)
        able = {name: call for name, call in ways.items() if runs(call)}
        # one way alone wins without a clock
        taken = (clock or _gpu_seconds)([*able.values()]) if len(able) > 1 else [0.0] * len(able)
        found[tokens] = dict.fromkeys(ways, math.inf) | dict(zip(able, taken, strict=True))
    return found


def runs(call: Call) -> bool:
    """Whether a call runs here: its kernel compiles, and the GPU takes it.

    Raises:
        RuntimeError: the memory is full, or the GPU answers nothing any more, as after an illegal
            access. That is a fault of the call, and every other call would fail too.
    """
    try:
        call()
    except torch.OutOfMemoryError:
        raise
    except NOT_RUNNING as error:
        _wait()
        reason = f"{type(error).__name__}: {error}"
        if reason not in said:
            said.add(reason)
            log.warning("a kernel is left out on this GPU: %s", reason)
        return False
    _wait()
    return True


def _wait() -> None:
    """For the GPU, which reports an illegal access only then."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


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
