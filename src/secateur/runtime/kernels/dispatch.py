"""Measures once for each kind of matrix which way is fastest, for how many tokens.

| way    | what it does                                                                     |
|--------|----------------------------------------------------------------------------------|
| kernel | our kernel on the stored matrix, eight tokens at a time                          |
| blocks | a tile of rows is expanded and meets all tokens, then the next (`csrc/blocks.c`) |

Both ways of a matrix have the same numbers, to the order of sums: activations that meet integers
are rounded in both, others in none. The kernel reads less, the other way computes faster, so it
wins for many tokens. If for one token the kernel is slower than on dense matrices, the matrices
should be dense; `gain` measures this. Decoding reads all weights of a model for every token, so
before every measurement as much other memory is read as the other matrices take.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from secateur.errors import ShapeError
from secateur.runtime.kernels.library import MAX_BATCH, TYPES, kernel_info
from secateur.runtime.kernels.matrix import KernelMatrix, kernels, no_kernel
from secateur.timing import alternate, seconds_of

TRIED_TOKENS = (4, 8, 16, 32, 64)
REPEATS = 5
CACHE_BYTES = 64 * 2**20


@dataclass(frozen=True)
class KernelChoice:
    """How matrices of one kind are multiplied, on a CPU or a GPU.

    Args:
        kernel_up_to: the most tokens for which the kernel is not the slower way.
        gain: for one token, seconds on dense matrices divided by seconds of the kernel on these. On
            a CPU, dense is the faster of torch and our kernel, and integers are compared with the
            same integers; it is infinite for dense matrices.
    """

    kernel_up_to: int
    gain: float


_measured: dict[tuple[object, ...], KernelChoice] = {}


def kind_of(matrix: KernelMatrix, dtype: torch.dtype) -> tuple[object, ...]:
    """The properties that decide how fast a matrix is to multiply."""
    info = kernel_info()
    density = matrix.nonzeros / (matrix.rows * matrix.columns)
    packed = matrix.packed
    shape = (matrix.rows, matrix.columns)
    values = (matrix.dtype, matrix.group)
    return (shape, values, packed, round(10 * density), dtype, info.tier, info.threads)


def choose(
    matrices: Sequence[KernelMatrix], dtype: torch.dtype, others: int = CACHE_BYTES
) -> KernelChoice:
    """The choice for matrices of one kind; measured on the first call.

    Args:
        matrices: of one kind; more matrices fit less in a cache, as in a real run.
        dtype: of the activations.
        others: bytes of the model's other matrices, which are read between two uses of these.
    """
    kind = kind_of(matrices[0], dtype)
    if kind not in _measured:
        _measured[kind] = measure(matrices, dtype, others)
    return _measured[kind]


def measure(matrices: Sequence[KernelMatrix], dtype: torch.dtype, others: int) -> KernelChoice:
    """Time all ways on random activations."""
    gain = measured_gain(matrices, dtype, others)
    up_to = 1
    for tokens in TRIED_TOKENS:
        x = torch.randn(tokens, matrices[0].columns).to(dtype)
        by_eights, at_once = _least_seconds(
            [lambda m=m, x=x: by_kernel(m, x) for m in matrices[:2]],
            [lambda m=m, x=x: by_blocks(m, x) for m in matrices[:2]],
        )
        if by_eights > at_once:
            break
        up_to = tokens
    return KernelChoice(up_to, gain)


def measured_gain(matrices: Sequence[KernelMatrix], dtype: torch.dtype, others: int) -> float:
    """The value of `KernelChoice.gain`."""
    first = matrices[0]
    if not first.packed:
        return math.inf
    count = -(-CACHE_BYTES // first.nbytes)
    one = torch.randn(1, first.columns).to(dtype)
    stored = [m.dense(dtype) for m in matrices[:count]]
    weights = [m.weight for m in stored if m.weight is not None]  # torch has no integers
    kernel, own, *plain = _least_seconds(
        [lambda m=m: by_kernel(m, one) for m in matrices[:count]],
        [lambda m=m: by_kernel(m, one) for m in stored],
        *([[lambda w=w: functional.linear(one, w) for w in weights]] if weights else []),
        before=torch.zeros(min(others, CACHE_BYTES) // 8, dtype=torch.int64).sum,
    )
    return min([own, *plain]) / kernel


def _least_seconds(
    *kernels: Sequence[Callable[[], Tensor]], before: Callable[[], object] = lambda: None
) -> list[float]:
    """For each way the lowest mean time of its calls; the ways take turns.

    Args:
        kernels: the calls of each way.
        before: runs before every measurement, which does not count it.
    """

    def mean_seconds(calls: Sequence[Callable[[], Tensor]]) -> float:
        def all_of_them() -> None:
            for call in calls:
                call()

        before()
        return seconds_of(all_of_them) / len(calls)

    return alternate(kernels, mean_seconds, min, turns=1 + REPEATS)


def by_kernel(matrix: KernelMatrix, x: Tensor) -> Tensor:
    """The product x · Wᵀ [tokens, out] by the kernel, at most eight tokens at a time."""
    if len(x) <= MAX_BATCH:
        return matrix.multiply(x)
    return torch.cat([matrix.multiply(part) for part in x.split(MAX_BATCH)])


def by_blocks(matrix: KernelMatrix, x: Tensor) -> Tensor:
    """The product x · Wᵀ, computed by the kernels for any number of tokens.

    Args:
        matrix: W [out, in].
        x: [tokens, in], float32 or bfloat16. bfloat16 values with float32 x are computed in
            float32. With integer values, x is rounded to int8 with one scale per 64 entries.

    Returns:
        [tokens, out] of the dtype of x.

    Raises:
        ShapeError: x does not fit the matrix.
        KernelError: there are no kernels here.
    """
    if x.ndim != 2 or x.shape[1] != matrix.columns or x.device.type != "cpu" or len(x) == 0:
        raise ShapeError(
            f"x of shape {tuple(x.shape)} on {x.device}, for rows of {matrix.columns} on the cpu"
        )
    if x.dtype not in (torch.float32, torch.bfloat16):
        raise ShapeError(f"x is {x.dtype}; blocks need float32 or bfloat16")
    x = x.contiguous()
    y = torch.empty(len(x), matrix.rows, dtype=x.dtype)
    status = kernels().sct_prompt(
        ctypes.byref(matrix.c),
        TYPES[x.dtype],
        x.data_ptr(),
        matrix.columns,
        y.data_ptr(),
        matrix.rows,
        len(x),
    )
    if status != 0:
        raise no_kernel()
    return y
