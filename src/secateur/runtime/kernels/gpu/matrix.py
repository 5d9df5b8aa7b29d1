"""A weight matrix in the bitmask format on a GPU, and its products.

| part     | what                                                              |
|----------|-------------------------------------------------------------------|
| `mask`   | uint8 [out, tiles · 32], bit j of a row little end first          |
| `starts` | int64 [out, tiles]: how many values lie before each tile          |
| `values` | kept weights row by row; codes of 4 bits lie two in a byte        |
| `scale`  | float32 [out] where values are int8                               |
| `scales` | codes and exponents where values are 4 bits                       |

A tile is 256 columns. The table of starts is 1/4 of a bit for each weight.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from secateur.errors import ShapeError
from secateur.quantization.groups import Scales
from secateur.runtime.formats.bits import pack_bits, pack_numbers
from secateur.runtime.kernels.gpu.bitmask_kernel import TOKENS, bitmask_expand, bitmask_product

LANES = 32
COLUMNS = 8 * LANES
"""Columns of a tile."""
ROWS = 16
PROGRAMS = 528
"""Programs to start at least: four for each multiprocessor of an H100."""


@dataclass(frozen=True)
class GpuMatrix:
    """A weight [out, in] in the bitmask format, on one device.

    Attributes:
        shape: (out, in).
        mask: see above, as the other parts.
        starts: of the tiles.
        values: the kept weights: float32, bfloat16, float16, int8, or uint8 for codes of 4 bits.
        scale: of int8 values.
        scales: of codes of 4 bits.
        group: columns that share a scale of `scales`.
    """

    shape: tuple[int, int]
    mask: Tensor
    starts: Tensor
    values: Tensor
    scale: Tensor | None = None
    scales: Scales | None = None
    group: int = 0

    @classmethod
    def of(
        cls,
        mask: Tensor,
        values: Tensor,
        *,
        scale: Tensor | None = None,
        scales: Scales | None = None,
        group: int = 0,
        device: torch.device | str = "cuda",
    ) -> GpuMatrix:
        """The matrix that a mask and its kept values describe.

        Args:
            mask: bool [out, in] on the CPU.
            values: kept weights, row by row; int8 from −8 to 7 with `scales`.
            scale: float32 [out], for int8: W = scale · values.
            scales: for weights of 4 bits.
            group: columns that share a scale of `scales`.
            device: where it will be.

        Raises:
            ShapeError: there are more or fewer values than the mask keeps.
        """
        rows, columns = mask.shape
        count = int(mask.sum())
        if count != values.numel():
            raise ShapeError(f"the mask keeps {count} weights, but there are {values.numel()}")
        tiles = -(-columns // COLUMNS)
        bits = mask.new_zeros(rows, tiles * COLUMNS)
        bits[:, :columns] = mask
        # running through the rows, as the values do: a tile begins where the one before it ends
        ends = bits.view(rows * tiles, COLUMNS).sum(1).cumsum(0)
        starts = torch.cat([ends.new_zeros(1), ends[:-1]]).view(rows, tiles)
        if scales is not None:
            values = pack_numbers(values, 4)
            scales = Scales(scales.exponent.to(device), scales.code.contiguous().to(device))
        return cls(
            (rows, columns),
            pack_bits(bits).to(device),
            starts.to(device),
            values.to(device),
            None if scale is None else scale.float().to(device),
            scales,
            group,
        )

    @property
    def nonzeros(self) -> int:
        """Kept weights; up to one more where codes of 4 bits fill a byte."""
        return self.values.numel() * (2 if self.scales is not None else 1)

    @property
    def nbytes(self) -> int:
        """Its memory in bytes."""
        parts = [self.mask, self.starts, self.values, self.scale]
        if self.scales is not None:
            parts += [self.scales.code, self.scales.exponent]
        return sum(part.nbytes for part in parts if part is not None)

    def multiply(self, x: Tensor) -> Tensor:
        """The product x · Wᵀ.

        Sums are float32. For several tokens the weights are rounded to the dtype of x before they
        are multiplied; bfloat16, int8 and 4 bits with scales are exact in bfloat16 as they are.

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
        bitmask_product[blocks, splits](
            x.contiguous(),
            parts,
            *self.stored,
            rows,
            columns,
            tokens,
            tiles,
            each,
            self.groups,
            ROWS=ROWS,
            LANES=LANES,
            CODES=self.scales is not None,
            GROUP=self.group,
            MANY=tokens > 1,
            # Triton's interpreter, on the CPU, multiplies no bfloat16
            WIDE=x.device.type == "cpu" or x.dtype == torch.float32,
        )
        # the splits of a row are added by torch: no atomics, so the same bits every time
        y = parts.sum(0)
        return (y if self.scale is None else y * self.scale).to(x.dtype)

    def dense(self, dtype: torch.dtype) -> Tensor:
        """The matrix itself, [out, in]."""
        rows, columns = self.shape
        tiles = self.starts.shape[1]
        out = torch.empty(rows, columns, dtype=dtype, device=self.mask.device)
        bitmask_expand[-(-rows // ROWS), tiles](
            out,
            *self.stored,
            rows,
            columns,
            tiles,
            self.groups,
            ROWS=ROWS,
            LANES=LANES,
            CODES=self.scales is not None,
            GROUP=self.group,
        )
        return out if self.scale is None else out * self.scale[:, None].to(dtype)

    @property
    def groups(self) -> int:
        """Groups of a row; 0 without."""
        return 0 if self.scales is None else self.scales.code.shape[1]

    @property
    def stored(self) -> tuple[Tensor, ...]:
        """The parts as the kernels take them; what is not read is any tensor."""
        if self.scales is None:
            return self.mask, self.starts, self.values, self.mask, self.mask
        return self.mask, self.starts, self.values, self.scales.code, self.scales.exponent


def divided(blocks: int, tiles: int) -> tuple[int, int]:
    """How the tiles of a block of rows are divided: tiles of a program, and programs.

    Every tile takes as long as another: all its lanes read their mask, kept or not.
    """
    each = -(-tiles // max(1, min(tiles, -(-PROGRAMS // blocks))))
    return each, -(-tiles // each)
