"""Blocks of GGUF: how a matrix is stored in each type.

A block that is on an int4 grid already (`quantization.groups`) is stored in Q4_0 without a change:
its scale has 5 significant bits, which float16 holds between 2⁻²⁰ and 65504, and |q| ≤ 7 fits in
−8 … 7. All other blocks are rounded as llama.cpp rounds them, by the package gguf.
"""

from __future__ import annotations

from types import MappingProxyType

import gguf
import numpy as np
import torch
from torch import Tensor

from secateur.models.checkpoint import CheckpointReader
from secateur.quantization.groups import AT_ONCE, GroupGrid
from secateur.runtime.dense_view import DenseView

BLOCK = 32
"""Weights of a row in one block of Q8_0, Q5_0 and Q4_0."""

Q = gguf.GGMLQuantizationType

TYPES = MappingProxyType(
    {"q8_0": Q.Q8_0, "f16": Q.F16, "bf16": Q.BF16, "f32": Q.F32, "q5_0": Q.Q5_0, "q4_0": Q.Q4_0}
)
"""The types of matrices. Each keeps exact zeros."""

STORED = "stored"
"""The name of the type that gives every matrix what is nearest to how the source stores it."""

NEAREST = MappingProxyType(
    {
        "float32": Q.F32,
        "float16": Q.F16,
        "bfloat16": Q.BF16,
        "int8": Q.Q8_0,
        "int4": Q.Q4_0,
        "int3": Q.Q4_0,
    }
)
"""The type for stored values: exact for floats and, where it is on a grid of groups, for int4."""


def bytes_per_row(columns: int, type: Q) -> int:
    """The bytes of a row of so many weights."""
    block, size = gguf.GGML_QUANT_SIZES[type]
    return columns // block * size


def nearest_types(reader: CheckpointReader) -> dict[str, Q]:
    """The type of every tensor of a checkpoint that keeps its numbers best at its size.

    Args:
        reader: of a folder, compressed or not.
    """
    found = {}
    for name, entry in reader.entries.items():
        layout = reader.layout_of(name) if isinstance(reader, DenseView) else None
        values = str(entry.dtype).removeprefix("torch.") if layout is None else layout["values"]
        found[name] = NEAREST.get(values, Q.F32)
    return found


def stored_blocks(weight: Tensor, type: Q) -> np.ndarray:
    """A matrix [rows, columns], or a stack of them, as a file stores it.

    Returns:
        float32 for F32, float16 for F16, else bytes [rows, bytes_per_row].
    """
    values = weight.float()
    if type == Q.Q4_0:
        rows = values.flatten(0, -2).split(max(1, AT_ONCE // values.shape[-1]))
        return np.concatenate([q4_0(part) for part in rows]).reshape(*weight.shape[:-1], -1)
    return gguf.quants.quantize(values.numpy(), type)


def dequantized(stored: np.ndarray, type: Q) -> Tensor:
    """The weights that llama.cpp reads from what was stored."""
    found = stored if type in (Q.F32, Q.F16) else gguf.quants.dequantize(stored, type)
    return torch.from_numpy(found if found.flags.writeable else found.copy())  # a view of a file


def q4_0(values: Tensor) -> np.ndarray:
    """A float32 matrix as blocks of Q4_0, exact where a block is on an int4 grid.

    A block is the scale d, float16, and 16 bytes: byte j holds q + 8 of weight j in its lower half
    and of weight j + 16 in its upper half. The weight is d · q.
    """
    rows = len(values)
    blocks = values.reshape(rows, -1, BLOCK)
    scale, _ = GroupGrid(4, BLOCK).recovered(values)  # larger groups are some with equal scales
    scale = scale.masked_fill(scale == 0, 1.0).half()[:, :, None]
    codes = (blocks / scale).round_().clamp_(-8, 7)
    exact = (codes * scale == blocks).all(dim=2)
    shifted = (codes + 8).to(torch.uint8)
    packed = shifted[:, :, : BLOCK // 2] | (shifted[:, :, BLOCK // 2 :] << 4)
    stored = torch.cat([scale.view(torch.uint8), packed], dim=2)
    other = ~exact.all(dim=1)
    if other.any():
        rounded = torch.from_numpy(gguf.quants.quantize(values[other].numpy(), Q.Q4_0))
        places = exact[other][:, :, None]
        stored[other] = stored[other].where(places, rounded.view(len(rounded), -1, 2 + BLOCK // 2))
    return stored.reshape(rows, -1).numpy()
