"""Products for many tokens, by blocks of integers (`csrc/blocks.c`)."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from secateur.errors import ShapeError
from secateur.runtime.kernels.library import TYPES
from secateur.runtime.kernels.matrix import KernelMatrix, kernels, no_kernel


def by_blocks(matrix: KernelMatrix, x: Tensor) -> Tensor:
    """The product x · Wᵀ of integer values, with x rounded to int8 with one scale per 256 entries.

    Args:
        matrix: W [out, in], of int8 or in groups of 4 bits.
        x: [tokens, in], any number of tokens, float32 or bfloat16.

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
    if x.dtype not in (torch.float32, torch.bfloat16) or not matrix.integers:
        raise ShapeError(f"x is {x.dtype} and values are {matrix.dtype}; blocks need integers")
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
