"""A weight of floats in the bitmask format on a GPU, and the Triton kernels that multiply by it.

| part     | what                                                              |
|----------|-------------------------------------------------------------------|
| `mask`   | uint8 [out, tiles · 32], bit j of a row little end first          |
| `starts` | int64 [out, tiles]: how many values lie before each tile          |
| `values` | kept weights row by row, and a zero behind them                   |

A tile is 256 columns: `LANES` bytes of the mask. The table of starts is 1/4 of a bit for each
weight. A lane has one byte: eight weights. It finds its values by counting: those before the tile
come from the table, those of the lanes before it from a sum over the lanes, those of its own eight
weights one after the other. So a tile needs no other tile, and tiles of one row can be divided
among programs (split-K).

For one token the products of a lane are added in float32 and the lanes at the end. For 2 to 16
tokens the eight weights of all lanes are eight matrices [ROWS, LANES], which tensor cores multiply.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional

from secateur.errors import ShapeError
from secateur.runtime.formats.bits import pack_bits

LANES = 32
COLUMNS = 8 * LANES
"""Columns of a tile."""
ROWS = 16
TOKENS = 16
"""The most tokens of one product."""
PROGRAMS = 528
"""Programs to start at least: four for each multiprocessor of an H100."""


@triton.jit
def tile_of(mask, starts, values, row, tile, tiles, LANES: tl.constexpr):
    """The bytes of a tile's mask, int32 [ROWS, LANES], and where the values of each byte begin."""
    # int64, so that no matrix is too large
    places = row[:, None].to(tl.int64) * (tiles * LANES) + tile * LANES
    bits = tl.load(mask + places + tl.arange(0, LANES)[None, :]).to(tl.int32)
    # the ones of a byte: counted in pairs, in nibbles, then of both nibbles; no table, no loop
    pairs = bits - ((bits >> 1) & 0x55)
    fours = (pairs & 0x33) + ((pairs >> 2) & 0x33)
    count = (fours + (fours >> 4)) & 0x0F
    first = tl.load(starts + row * tiles + tile)
    # an exclusive sum over the lanes: the values of all lanes before this one
    return bits, values + first[:, None] + (tl.cumsum(count, 1) - count)


@triton.jit
def bitmask_product(
    x, y, mask, starts, values, rows, tokens, tiles, tiles_each,
    ROWS: tl.constexpr, LANES: tl.constexpr, MANY: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Parts of x · Wᵀ, float32 [splits, tokens, rows]; program (i, k) adds the tiles of split k.

    Args:
        x: [tokens, tiles · 8 · LANES], contiguous.
        y: the parts.
        mask: uint8 [rows, tiles · LANES].
        starts: int64 [rows, tiles]: how many values lie before each tile.
        values: the kept weights, and one more.
        rows: of W.
        tokens: at most 16; 1 unless `MANY`.
        tiles: of a row.
        tiles_each: of a split.
        ROWS: rows of a program; at least 16 for `MANY`.
        LANES: bytes of a tile.
        MANY: whether there are several tokens.
        WIDE: whether several tokens are multiplied in float32, as Triton's interpreter must.
    """
    place = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    row = tl.minimum(place, rows - 1)  # rows past the last repeat it, so that no load is masked
    split = tl.program_id(1)
    token = tl.arange(0, 16)  # tl.dot needs 16 columns; those of no token are zeros
    known = (token < tokens)[None, :]
    one_token = tl.zeros((ROWS, LANES), tl.float32)
    all_tokens = tl.zeros((ROWS, 16), tl.float32)
    for tile in range(split * tiles_each, tl.minimum(tiles, (split + 1) * tiles_each)):
        bits, at = tile_of(mask, starts, values, row, tile, tiles, LANES)
        # a lane's eight weights one after the other, so `at` moves on by those that are kept
        for bit in tl.static_range(8):
            kept = (bits >> bit) & 1
            column = (tile * LANES + tl.arange(0, LANES)) * 8 + bit
            weight = tl.load(
                at
            )  # the next value if there is none: a load without a mask is cheaper
            if MANY:
                places = token[None, :] * (tiles * LANES * 8) + column[:, None]
                inputs = tl.load(x + places, mask=known, other=0)
                held = tl.where(kept != 0, weight, tl.zeros_like(weight))
                kind = tl.float32 if WIDE else inputs.dtype
                all_tokens = tl.dot(
                    held.to(kind), inputs.to(kind), all_tokens, input_precision="ieee"
                )
            else:
                inputs = tl.load(x + column).to(tl.float32)[None, :]
                one_token = tl.where(
                    kept != 0, one_token + weight.to(tl.float32) * inputs, one_token
                )
            at += kept
    if MANY:
        places = (split * tokens + token[None, :]) * rows + place[:, None]
        tl.store(y + places, all_tokens, mask=(place < rows)[:, None] & known)
    else:
        tl.store(y + split * rows + place, tl.sum(one_token, 1), mask=place < rows)


@triton.jit
def bitmask_expand(
    out, mask, starts, values, rows, columns, tiles, ROWS: tl.constexpr, LANES: tl.constexpr
):
    """W itself, [rows, columns] of the dtype of `out`; program (i, k) writes tile k of its rows."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    tile = tl.program_id(1)
    bits, at = tile_of(mask, starts, values, tl.minimum(row, rows - 1), tile, tiles, LANES)
    for bit in tl.static_range(8):
        kept = (bits >> bit) & 1
        stored = tl.load(at)
        weight = tl.where(kept != 0, stored, tl.zeros_like(stored))
        column = (tile * LANES + tl.arange(0, LANES)) * 8 + bit
        inside = (row < rows)[:, None] & (column < columns)[None, :]
        places = row[:, None].to(tl.int64) * columns + column[None, :]
        tl.store(out + places, weight.to(out.dtype.element_ty), mask=inside)
        at += kept


@dataclass(frozen=True)
class GpuBitmask:
    """A weight [out, in] in the bitmask format, on one device.

    Attributes:
        shape: (out, in).
        mask: see above, as the other parts.
        starts: of the tiles.
        values: float32, bfloat16 or float16.
    """

    shape: tuple[int, int]
    mask: Tensor
    starts: Tensor
    values: Tensor

    integers = False

    @classmethod
    def of(cls, mask: Tensor, values: Tensor, device: torch.device | str = "cuda") -> GpuBitmask:
        """The matrix that a mask and its kept values describe.

        Args:
            mask: bool [out, in] on the CPU.
            values: kept weights, row by row.
            device: where it will be.

        Raises:
            ShapeError: there are more or fewer values than the mask keeps.
        """
        rows, columns = mask.shape
        count = int(mask.sum())
        if count != values.numel():
            raise ShapeError(f"the mask keeps {count} weights, but there are {values.numel()}")
        tiles = -(-columns // COLUMNS)
        bits = functional.pad(mask, (0, tiles * COLUMNS - columns))
        # running through the rows, as the values do: a tile begins where the one before it ends
        ends = bits.view(rows * tiles, COLUMNS).sum(1).cumsum(0)
        starts = torch.cat([ends.new_zeros(1), ends[:-1]]).view(rows, tiles)
        values = functional.pad(values, (0, 1))
        parts = (pack_bits(bits), starts, values)
        return cls((rows, columns), *(part.to(device) for part in parts))

    @property
    def kind(self) -> tuple[object, ...]:
        """The properties that decide how fast it is to multiply."""
        # in tenths: matrices of a layer differ by a few weights, and take the same time
        share = round(10 * self.nonzeros / (self.shape[0] * self.shape[1]))
        return self.shape, self.values.dtype, share

    @property
    def nonzeros(self) -> int:
        """Kept weights."""
        return self.values.numel() - 1

    @property
    def nbytes(self) -> int:
        """Its memory in bytes."""
        return sum(part.nbytes for part in self.parts)

    @property
    def parts(self) -> tuple[Tensor, ...]:
        """The parts in the order in which the kernels take them."""
        return self.mask, self.starts, self.values

    def multiply(self, x: Tensor) -> Tensor:
        """The product x · Wᵀ.

        Sums are float32. For several tokens the weights are rounded to the dtype of x before they
        are multiplied.

        Args:
            x: [tokens, in], float32, bfloat16 or float16, at most 16 tokens.

        Returns:
            [tokens, out] of the dtype of x.

        Raises:
            ShapeError: x does not fit the matrix.
        """
        rows, columns = self.shape
        tokens = len(x)
        if x.shape[1:] != (columns,) or not 1 <= tokens <= TOKENS:
            raise ShapeError(f"x {list(x.shape)} for 1 to {TOKENS} rows of {columns}")
        tiles = self.starts.shape[1]
        blocks = -(-rows // ROWS)
        each, splits = divided(blocks, tiles)
        parts = torch.empty(splits, tokens, rows, dtype=torch.float32, device=x.device)
        missing = tiles * COLUMNS - columns
        with torch.cuda.device_of(x):  # Triton launches on the current device
            bitmask_product[blocks, splits](
                functional.pad(x, (0, missing)) if missing else x.contiguous(),
                parts, *self.parts, rows, tokens, tiles, each,
                ROWS=ROWS, LANES=LANES, MANY=tokens > 1,
                # Triton's interpreter, on the CPU, multiplies no bfloat16
                WIDE=x.device.type == "cpu" or x.dtype == torch.float32,
            )  # fmt: skip
        # the splits of a row are added by torch: no atomics, so the same bits every time
        return parts.sum(0).to(x.dtype)

    def expanded(self, x: Tensor) -> Tensor:
        """The product for any number of tokens: torch multiplies by the matrix itself."""
        return functional.linear(x, self.dense(x.dtype))

    def dense(self, dtype: torch.dtype) -> Tensor:
        """The matrix itself, [out, in]."""
        rows, columns = self.shape
        tiles = self.starts.shape[1]
        out = torch.empty(rows, columns, dtype=dtype, device=self.mask.device)
        with torch.cuda.device_of(out):
            bitmask_expand[-(-rows // ROWS), tiles](
                out, *self.parts, rows, columns, tiles, ROWS=ROWS, LANES=LANES
            )
        return out


def divided(blocks: int, tiles: int) -> tuple[int, int]:
    """How the tiles of a block of rows are divided: tiles of a program, and programs.

    Every tile takes as long as another: all its lanes read their mask, kept or not.
    """
    each = -(-tiles // max(1, min(tiles, -(-PROGRAMS // blocks))))
    return each, -(-tiles // each)
