"""A Triton kernel for a few tokens on 2:4 matrices as CUTLASS stores them.

torch's products on sparse tensor cores are made for many tokens. For one token all that counts is
how many bytes are read, and a 2:4 matrix has 9 bits for a weight. A lane takes a quad: 4 columns,
of which 2 are kept. Places are known without counting, so no lane depends on another.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from secateur.runtime.kernels.gpu.bitmask import divided

ROWS, QUADS = 32, 16
"""Of a tile. CUTLASS stores the places of 32 rows together."""


@triton.jit
def meta_place(row, column, rows):
    """Where CUTLASS stores the places of 4 quads: of a row, and a column of [rows, quads / 4]."""
    # within 32 rows, row 8a + b goes to 4b + a
    moved = row // 32 * 32 + (row % 8) * 4 + (row % 32) // 8
    shift = (column & 1) - (moved & 1)  # 2 × 2 blocks are transposed
    moved += shift
    column -= shift
    return (column >> 1) * rows * 2 + moved * 2 + (column & 1)


@triton.jit
def two_of_four_product(
    x, y, packed, meta, columns, rows, quads, width, tokens, tiles_each,
    TOKENS: tl.constexpr, SPLIT: tl.constexpr, ROWS: tl.constexpr, QUADS: tl.constexpr,
):  # fmt: skip
    """Parts of x · Wᵀ, float32 [splits, tokens, rows]; program (i, k) adds the tiles of split k.

    Args:
        x: [tokens, width], contiguous.
        y: the parts.
        packed: the kept weights [rows, 2 · quads], bfloat16 or float16.
        meta: their places, int16 [rows, quads / 4] in CUTLASS' order.
        columns: of the weight, int32 [4 · quads], for `SPLIT`.
        rows: of W; a multiple of 32.
        quads: of a row.
        width: of x.
        tokens: at most `TOKENS`.
        tiles_each: tiles of a split.
        TOKENS: a power of two.
        SPLIT: whether the weight is another matrix than the 2:4 one.
        ROWS: of a tile.
        QUADS: of a tile.
    """
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS))[:, None]
    split = tl.program_id(1)
    token = tl.arange(0, TOKENS)
    known = (token < tokens)[:, None, None]
    start = x + (token * width)[:, None, None]
    own = packed + row.to(tl.int64) * (2 * quads)
    sums = tl.zeros((TOKENS, ROWS, QUADS), tl.float32)
    last = tl.minimum(tl.cdiv(quads, QUADS), (split + 1) * tiles_each)
    for tile in range(split * tiles_each, last):
        quad = (tile * QUADS + tl.arange(0, QUADS))[None, :]
        inside = quad < quads
        bits = tl.load(meta + meta_place(row, quad >> 2, rows), mask=inside, other=0).to(tl.int32)
        # int16 with the places of 4 quads: 4 bits each, two places of 2 bits
        bits = bits >> ((quad & 3) * 4)
        for kept in tl.static_range(2):
            weight = tl.load(own + (2 * quad + kept), mask=inside, other=0).to(tl.float32)
            column = 4 * quad + ((bits >> (2 * kept)) & 3)
            # a wide column is a copy of a column of the weight
            if SPLIT:
                column = tl.load(columns + column, mask=inside, other=0)
            inputs = tl.load(start + column[None, :, :], mask=known & inside[None, :, :], other=0)
            sums += weight[None, :, :] * inputs.to(tl.float32)
    places = (split * tokens + token[:, None]) * rows + tl.trans(row)
    tl.store(y + places, tl.sum(sums, 2), mask=(token < tokens)[:, None])


def multiply_two_of_four(
    x: Tensor, packed: Tensor, meta: Tensor, columns: Tensor | None = None
) -> Tensor:
    """The product x · Wᵀ [tokens, out]; sums are float32.

    Args:
        x: [tokens, in], at most 4 tokens.
        packed: kept weights [out, lifted / 2].
        meta: their places [out, lifted / 16].
        columns: columns of the weight, int32 [lifted]; None where the weight is 2:4 itself.
    """
    tokens, width = x.shape
    rows, quads = len(packed), packed.shape[1] // 2
    blocks = rows // ROWS
    each, splits = divided(blocks, -(-quads // QUADS))
    parts = torch.empty(splits, tokens, rows, dtype=torch.float32, device=x.device)
    with torch.cuda.device_of(x):  # Triton launches on the current device
        two_of_four_product[blocks, splits](
            x.contiguous(), parts, packed, meta, meta if columns is None else columns,
            rows, quads, width, tokens, each,
            TOKENS=triton.next_power_of_2(tokens), SPLIT=columns is not None,
            ROWS=ROWS, QUADS=QUADS,
        )  # fmt: skip
    return parts.sum(0).to(x.dtype)
