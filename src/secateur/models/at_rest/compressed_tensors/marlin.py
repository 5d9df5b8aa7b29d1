"""Integers of 4 or 8 bits with 2:4 zeros, in the order of a GPU kernel: the format marlin-24.

    weight_packed  int32 [in / 32, out · 16 / F]; F = 8 integers of 4 bits or 4 of 8 bits each
    scale_packed   float16 [groups of 128 columns, or 1; out]
    meta           int16, out · in / 16 of them: which 2 of every 4 columns the integers belong to

    W = (q − 2^(bits − 1)) · scale       at the 2 columns that meta names; 0 at the other 2

The orders are those of Marlin 2:4 (github.com/IST-DASLab/Sparse-Marlin) for the integers and of
CUTLASS for the indices. The library that wrote these files cannot read them back.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from secateur.models.at_rest import Assembly, Parts, damaged
from secateur.models.checkpoint import CheckpointReader

PARTS = ("weight_packed", "scale_packed", "meta")
GROUP = 128
TILE = 16


def marlin_assembly(
    reader: CheckpointReader, parts: Mapping[str, str], dtype: torch.dtype
) -> Assembly:
    """The matrix that these parts make.

    Args:
        reader: the stored tensors.
        parts: the names of `PARTS`.
        dtype: of the model.

    Raises:
        CheckpointError: a part is missing, or has an impossible shape or dtype.
    """
    missing = set(PARTS) - parts.keys()
    if missing:
        raise damaged(f"there is no {min(missing)} beside them", next(iter(parts.values())))
    packed, scale, meta = (reader.entries[parts[role]] for role in PARTS)
    place = parts["weight_packed"]
    if (packed.dtype, meta.dtype) != (torch.int32, torch.int16) or len(packed.shape) != 2:
        raise damaged("the integers are not int32, or the indices not int16", place)
    if len(scale.shape) != 2 or not scale.dtype.is_floating_point:
        raise damaged("the scales are no matrix of floating point", parts["scale_packed"])
    columns, (groups, rows) = packed.shape[0] * 2 * TILE, scale.shape
    factor = rows * TILE // packed.shape[1] if packed.shape[1] else 0
    indices = rows * columns // TILE
    if factor not in (4, 8) or factor * packed.shape[1] != rows * TILE or rows % 64:
        raise damaged(f"{list(packed.shape)} integers do not fill {rows} rows", place)
    if torch.Size(meta.shape).numel() != indices:
        raise damaged(f"{list(meta.shape)} indices for a matrix of {rows} × {columns}", place)
    if groups != 1 and groups * GROUP != columns:
        raise damaged(f"{groups} groups of scales for {columns} columns", parts["scale_packed"])
    bits, shape = 32 // factor, (rows, columns)
    stored_as = f"marlin-24 int{bits}"
    return Assembly(parts, shape, dtype, stored_as, lambda p: _opened(p, bits, shape))


def _opened(parts: Parts, bits: int, shape: tuple[int, int]) -> Tensor:
    """The dense matrix [out, in] in float64, exact."""
    rows, columns = shape
    integers = in_order(_unpacked(parts["weight_packed"], bits), bits, rows)
    values = integers.t().to(torch.float64) - 2 ** (bits - 1)
    places = _indices_of(parts["meta"].flatten(), rows, columns // 16)
    first, second = places[..., 0], places[..., 1]
    if not (first < second).all():
        raise damaged("two indices of a group of 4 are not in ascending order", "meta")
    dense = torch.zeros(rows, columns // 4, 4, dtype=torch.float64)
    dense.scatter_(-1, places, values.reshape(rows, columns // 4, 2))
    return dense.view(rows, columns) * _scales_of(parts["scale_packed"], shape)


def _unpacked(packed: Tensor, bits: int) -> Tensor:
    """The unsigned integers of int32 words along the last axis, the lowest bits first."""
    shifts = torch.arange(0, 32, bits, dtype=torch.int32)
    return ((packed.unsqueeze(-1) >> shifts) & (2**bits - 1)).flatten(-2)


def _kernel_order(bits: int) -> Tensor:
    """The place in a tile of 16 × 64 of each integer, in the order of the kernel: [1024].

    A thread t of 32 holds rows 2 (t mod 4) + {0, 1, 8, 9} of two blocks in the columns from
    16 · (t div 8) + 8 · (t div 4 mod 2). Four neighbouring columns follow one another, and the
    integers of one word alternate between its halves.
    """
    thread, column, block = torch.arange(32), torch.arange(4), torch.arange(2)
    row = 2 * (thread % 4).view(-1, 1) + torch.tensor([0, 1, 8, 9])
    start = 256 * (thread // 8) + 8 * (thread // 4 % 2)
    place = (
        start.view(-1, 1, 1, 1)
        + column.view(1, -1, 1, 1)
        + 4 * block.view(1, 1, -1, 1)
        + 16 * row.view(32, 1, 1, 4)
    )
    halves = torch.arange(32 // bits).view(-1, 2).t().flatten()
    return place.reshape(-1, 32 // bits)[:, halves].flatten()


def in_order(stored: Tensor, bits: int, rows: int) -> Tensor:
    """The integers [in / 2, out] of the stored ones [in / 32, 16 out]."""
    tiles = torch.empty_like(stored).view(-1, 1024)
    tiles[:, _kernel_order(bits)] = stored.reshape(-1, 1024)
    square = tiles.view(len(stored), rows // TILE, TILE, TILE)
    return square.transpose(1, 2).reshape(len(stored) * TILE, rows)


def _indices_of(meta: Tensor, rows: int, words: int) -> Tensor:
    """The columns within each group of 4 of the two kept weights: int64 [out, in / 4, 2].

    Word w of row r, each of four groups, is stored as follows. The lowest six bits b₅ … b₀ of the
    row become b₁ b₅ b₄ b₃ b₀ b₂; then 2 × 2 squares of rows and words are transposed; then pairs of
    words are stored row after row.
    """
    row, word = torch.arange(rows).view(-1, 1), torch.arange(words).view(1, -1)
    low = row % 64
    moved = (
        (row - low) + 32 * (low // 2 % 2) + 4 * (low // 8) + 2 * (low % 2) + low // 4 % 2
    ).expand(rows, words)
    word = word.expand(rows, words)
    line, column = moved - moved % 2 + word % 2, word - word % 2 + moved % 2
    place = column // 2 * (2 * rows) + 2 * line + column % 2
    found = meta.to(torch.int64)[place].unsqueeze(-1) & 0xFFFF
    return (found >> torch.arange(0, 16, 2) & 3).view(rows, 4 * words, 2)


def _scales_of(packed: Tensor, shape: tuple[int, int]) -> Tensor:
    """The scales as they multiply the matrix: float64 [out, in], or [out, 1]."""
    columns = shape[1]
    groups = len(packed)
    # The library leaves the order of scales alone if a group is as long as half the columns.
    plain = packed if groups == 1 or columns <= 2 * GROUP else _scales_in_order(packed)
    return plain.t().to(torch.float64).repeat_interleave(columns // groups, 1)


def _scales_in_order(packed: Tensor) -> Tensor:
    """The scales [groups, out] of stored ones: of every 8, the two halves alternate."""
    alternating = torch.arange(8).view(2, 4).t().flatten()
    plain = torch.empty_like(packed).view(-1, 8)
    plain[:, alternating] = packed.reshape(-1, 8)
    return plain.view(packed.shape)
