"""Measures once for each kind of matrix which way is fastest, for how many tokens.

| way    | what it does                                                                     |
|--------|----------------------------------------------------------------------------------|
| kernel | our kernel on the stored matrix, eight tokens at a time                          |
| blocks | a tile of rows is expanded and meets all tokens, then the next (`csrc/blocks.c`) |

Both ways of a matrix have the same numbers, to the order of sums: activations that meet integers
are rounded in both, others in none. The kernel reads less, the other way computes faster, so it
wins for many tokens. If for one token the kernel is slower than on dense matrices, the matrices
should be dense; `speedup_over_dense` measures this. Decoding reads all weights of a model for every
token, so before every measurement as much other memory is read as the other matrices take.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional

from secateur.runtime.kernels.library import MAX_BATCH, kernel_info
from secateur.runtime.kernels.matrix import KernelMatrix, kernels
from secateur.timing import alternate, seconds_of

TRIED_TOKENS = (4, 8, 16, 32, 64)
REPEATS = 5
CACHE_BYTES = 64 * 2**20


@dataclass(frozen=True)
class KernelChoice:
    """How matrices of one kind are multiplied, on a CPU or a GPU.

    Args:
        kernel_up_to: the most tokens for which the kernel is not the slower way.
        speedup_over_dense: for one token, seconds on dense matrices divided by seconds of the
            kernel on these. On a CPU, dense is the faster of torch and our kernel, and integers are
            compared with the same integers; it is infinite for dense matrices.
    """

    kernel_up_to: int
    speedup_over_dense: float


_measured: dict[tuple[object, ...], KernelChoice] = {}
"""By kind: the linears of a model are of a few kinds, and a second load measures nothing."""


def kind_of(matrix: KernelMatrix, dtype: torch.dtype) -> tuple[object, ...]:
    """The properties that decide how fast a matrix is to multiply."""
    info, shape = kernel_info(), (matrix.rows, matrix.columns)
    # in tenths: matrices of a layer differ by a few weights, and take the same time
    density = round(10 * matrix.nonzeros / (matrix.rows * matrix.columns))
    stored = (matrix.dtype, matrix.group, matrix.packed, density)
    return (shape, stored, dtype, info.tier, info.threads)


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
    up_to = 1
    for tokens in TRIED_TOKENS:
        x = torch.randn(tokens, matrices[0].columns).to(dtype)
        # Two matrices are enough: for several tokens the arithmetic takes the time, not the memory.
        by_eights, at_once = _least_seconds(
            [[partial(way, matrix, x) for matrix in matrices[:2]] for way in (by_kernel, by_blocks)]
        )
        if by_eights > at_once:
            break
        up_to = tokens
    return KernelChoice(up_to, speedup_over_dense(matrices, dtype, others))


def speedup_over_dense(matrices: Sequence[KernelMatrix], dtype: torch.dtype, others: int) -> float:
    """How much faster the kernel is on packed matrices than the fastest dense way, for one token.

    Two or three ways take turns: the kernel on the packed matrices, the kernel on the same ones
    with their zeros, and torch where the weights are no integers. So many matrices take part that
    they do not fit in a cache together.

    Args:
        matrices: of one kind.
        dtype: of the activations.
        others: bytes of other matrices, which are read before every measurement.
    """
    if not matrices[0].packed:
        return math.inf
    # as many matrices as fill the cache once; of large ones that is one
    packed = matrices[: -(-CACHE_BYTES // matrices[0].nbytes)]
    dense = [matrix.dense(dtype) for matrix in packed]
    x = torch.randn(1, packed[0].columns).to(dtype)
    kernel_on_packed = [partial(by_kernel, matrix, x) for matrix in packed]
    kernel_on_dense = [partial(by_kernel, matrix, x) for matrix in dense]
    ways = [kernel_on_packed, kernel_on_dense]
    # torch has no product that rounds activations, so integers are left to the kernel
    weights = [matrix.weight for matrix in dense if matrix.weight is not None]
    if weights:
        ways.append([partial(functional.linear, x, weight) for weight in weights])
    # The sum reads as many bytes as lie between two uses of these matrices in a token.
    other_memory = torch.zeros(min(others, CACHE_BYTES) // 8, dtype=torch.int64)
    of_packed, *of_dense = _least_seconds(ways, before=other_memory.sum)
    return min(of_dense) / of_packed


def _least_seconds(
    ways: Sequence[Sequence[Callable[[], Tensor]]], before: Callable[[], object] = lambda: None
) -> list[float]:
    """For each way the lowest mean time of its calls; the ways take turns.

    Args:
        ways: the calls of each way.
        before: runs before every measurement, which does not count it.
    """

    def mean_seconds(calls: Sequence[Callable[[], Tensor]]) -> float:
        def all_of_them() -> None:
            for call in calls:
                call()

        before()
        return seconds_of(all_of_them) / len(calls)

    # the first turn warms up: it faults pages in and starts threads, so it is hardly the lowest
    return alternate(ways, mean_seconds, min, turns=1 + REPEATS)


def by_kernel(matrix: KernelMatrix, x: Tensor) -> Tensor:
    """The product x · Wᵀ [tokens, out] by the kernel, at most eight tokens at a time."""
    if len(x) <= MAX_BATCH:
        return matrix.multiply(x)
    return torch.cat([matrix.multiply(part) for part in x.split(MAX_BATCH)])


def by_blocks(matrix: KernelMatrix, x: Tensor) -> Tensor:
    """The product x · Wᵀ for any number of tokens, as `KernelMatrix.product`."""
    return matrix.product(kernels().sct_prompt, x)
