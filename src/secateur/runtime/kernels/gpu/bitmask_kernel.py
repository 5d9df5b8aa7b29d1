"""Triton kernels that read a matrix in the bitmask format.

A tile is `LANES` bytes of the mask in each of `ROWS` rows. A lane has one byte: eight weights. It
finds its values by counting: those before the tile come from a table, those of the lanes before it
from a sum over the lanes, those of its own eight weights one after the other. So a tile needs no
other tile, and tiles of one row can be divided among programs (split-K).

For one token the products of a lane are added in float32 and the lanes at the end. For 2 to 16
tokens the eight weights of all lanes are eight matrices [ROWS, LANES], which tensor cores multiply.
"""

from __future__ import annotations

import triton
import triton.language as tl

TOKENS = 16
"""The most tokens of one product."""


@triton.jit
def count_of(byte):
    """How many of the eight bits are 1."""
    # counts of 2 bits in pairs, of 4 in nibbles, then of both nibbles: no table, no loop
    pairs = byte - ((byte >> 1) & 0x55)
    fours = (pairs & 0x33) + ((pairs >> 2) & 0x33)
    return (fours + (fours >> 4)) & 0x0F


@triton.jit
def value_at(values, place, kept, CODES: tl.constexpr):
    """Stored values where they are kept, else 0. Of two codes in a byte, the low one is first."""
    if CODES:
        byte = tl.load(values + (place >> 1), mask=kept, other=0).to(tl.int32)
        # the nibble, then its sign: 8 to 15 mean −8 to −1
        code = (byte >> ((place & 1) * 4).to(tl.int32)) & 15
        return (code - ((code & 8) << 1)).to(tl.float32)
    return tl.load(values + place, mask=kept, other=0).to(tl.float32)


@triton.jit
def scale_of(code, exponent):
    """± 2^(e + c div 16) · (1 + (c mod 16) / 16), put together from the bits of a float32."""
    # exponent with bias 127 at bit 23, the 4 bits of the fraction at its top, the sign at bit 31
    bits = ((exponent + ((code >> 4) & 7) + 127) << 23) | ((code & 15) << 19) | ((code & 128) << 24)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def group_scales(code, exponent, row, byte, here, groups, GROUP: tl.constexpr):
    """The scales of the groups that the bytes of a tile are in, float32 [ROWS, LANES]."""
    group = byte * 8 // GROUP
    inside = here[:, None] & (group < groups)[None, :]
    codes = tl.load(code + row[:, None] * groups + group[None, :], mask=inside, other=0)
    exponents = tl.load(exponent + row, mask=here, other=0).to(tl.int32)
    return scale_of(codes.to(tl.int32), exponents[:, None])


@triton.jit
def tile_of(mask, starts, row, here, tile, tiles, LANES: tl.constexpr):
    """The bytes of a tile's mask, int32 [ROWS, LANES], and where their values begin."""
    byte = tile * LANES + tl.arange(0, LANES)
    # int64, so that no matrix is too large
    places = row[:, None].to(tl.int64) * (tiles * LANES) + byte[None, :]
    bits = tl.load(mask + places, mask=here[:, None], other=0).to(tl.int32)
    count = count_of(bits)
    first = tl.load(starts + row * tiles + tile, mask=here, other=0)
    # an exclusive sum over the lanes: the values of all lanes before this one
    return byte, bits, first[:, None] + (tl.cumsum(count, 1) - count)


@triton.jit
def with_products(sums, x, weight, column, columns, tokens, WIDE: tl.constexpr):
    """Sums [ROWS, 16] with the products of weights [ROWS, LANES] and their column of each token."""
    token = tl.arange(0, 16)  # tl.dot needs 16 columns; those of no token are zeros
    inside = (column < columns)[:, None] & (token < tokens)[None, :]
    inputs = tl.load(x + token[None, :] * columns + column[:, None], mask=inside, other=0)
    if WIDE:
        return tl.dot(weight, inputs.to(tl.float32), sums, input_precision="ieee")
    return tl.dot(weight.to(inputs.dtype), inputs, sums, input_precision="ieee")


@triton.jit
def bitmask_product(
    x,
    y,
    mask,
    starts,
    values,
    code,
    exponent,
    rows,
    columns,
    tokens,
    tiles,
    tiles_each,
    groups,
    ROWS: tl.constexpr,
    LANES: tl.constexpr,
    CODES: tl.constexpr,
    GROUP: tl.constexpr,
    MANY: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Parts of x · Wᵀ, float32 [splits, tokens, rows]; program (i, k) adds the tiles of split k.

    Args:
        x: [tokens, columns], contiguous.
        y: the parts.
        mask: uint8 [rows, tiles · LANES].
        starts: int64 [rows, tiles]: how many values lie before each tile.
        values: the kept weights, or codes of 4 bits.
        code: codes of group scales, uint8 [rows, groups]; not read without `GROUP`.
        exponent: of the rows, int8 [rows]; not read without `GROUP`.
        rows: of W.
        columns: of W.
        tokens: at most 16; 1 unless `MANY`.
        tiles: of a row.
        tiles_each: of a split.
        groups: of a row.
        ROWS: rows of a program; at least 16 for `MANY`.
        LANES: bytes of a tile.
        CODES: whether values are codes of 4 bits.
        GROUP: weights that share a scale; 0 for none.
        MANY: whether there are several tokens.
        WIDE: whether several tokens are multiplied in float32, as Triton's interpreter must.
    """
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    split = tl.program_id(1)
    here = row < rows
    token = tl.arange(0, 16)
    lone = tl.zeros((ROWS, LANES), tl.float32)
    all_tokens = tl.zeros((ROWS, 16), tl.float32)
    last = tl.minimum(tiles, (split + 1) * tiles_each)
    for tile in range(split * tiles_each, last):
        byte, bits, place = tile_of(mask, starts, row, here, tile, tiles, LANES)
        scale = tl.full((ROWS, LANES), 1.0, tl.float32)
        if GROUP:
            scale = group_scales(code, exponent, row, byte, here, groups, GROUP)
        # a lane's eight weights one after the other, so `place` moves on by those that are kept
        part = tl.zeros((ROWS, LANES), tl.float32)
        for bit in tl.static_range(8):
            kept = (bits >> bit) & 1
            weight = value_at(values, place, kept != 0, CODES)
            column = byte * 8 + bit
            if MANY:
                held = weight * scale
                all_tokens = with_products(all_tokens, x, held, column, columns, tokens, WIDE)
            else:
                inputs = tl.load(x + column, mask=column < columns, other=0).to(tl.float32)
                part += weight * inputs[None, :]
            place += kept
        lone += part * scale  # eight columns lie in one group, so one scale for all of them
    if MANY:
        places = (split * tokens + token[None, :]) * rows + row[:, None]
        tl.store(y + places, all_tokens, mask=here[:, None] & (token < tokens)[None, :])
    else:
        tl.store(y + split * rows + row, tl.sum(lone, 1), mask=here)


@triton.jit
def bitmask_expand(
    out,
    mask,
    starts,
    values,
    code,
    exponent,
    rows,
    columns,
    tiles,
    groups,
    ROWS: tl.constexpr,
    LANES: tl.constexpr,
    CODES: tl.constexpr,
    GROUP: tl.constexpr,
):
    """W itself, [rows, columns] of the dtype of `out`; program (i, k) writes tile k of its rows."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    here = row < rows
    byte, bits, place = tile_of(mask, starts, row, here, tl.program_id(1), tiles, LANES)
    scale = tl.full((ROWS, LANES), 1.0, tl.float32)
    if GROUP:
        scale = group_scales(code, exponent, row, byte, here, groups, GROUP)
    for bit in tl.static_range(8):
        kept = (bits >> bit) & 1
        weight = value_at(values, place, kept != 0, CODES) * scale
        column = byte * 8 + bit
        inside = here[:, None] & (column < columns)[None, :]
        places = row[:, None].to(tl.int64) * columns + column[None, :]
        tl.store(out + places, weight.to(out.dtype.element_ty), mask=inside)
        place += kept
