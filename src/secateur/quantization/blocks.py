"""The block types of ggml (GGUF files of llama.cpp) as grids: 4 to 8 bits, K types and IQ4.

    w = (d · s) · q − (d′ · m)           in float32, in this order

q is the code of a weight: an integer, or an entry of a table (IQ4). A sub-block of 16 or 32 weights
shares an integer scale s, and an integer minimum m where its type has minima. A block of 256 or 32
weights shares the float16 numbers d and d′. Types of 32 weights have no integers: s is 1; where
they have a minimum it is stored with the other sign, so m is −1.

`Blocks.values` are bit for bit the numbers that llama.cpp and its package `gguf` read from
`Blocks.encode()`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from secateur.errors import CheckpointError, RecipeError, ShapeError
from secateur.quantization.block_search import Found, search
from secateur.quantization.block_types import TYPES, BlockType, inverse
from secateur.quantization.groups import AT_ONCE
from secateur.quantization.int8 import not_finite
from secateur.registry import did_you_mean
from secateur.types import Weight


@dataclass(frozen=True)
class BlockGrid:
    """The grid of one type of ggml.

    Args:
        type: its name, such as "q4_k".

    Raises:
        RecipeError: there is no such type.

    Example:
        >>> import torch
        >>> from secateur.quantization.blocks import BlockGrid
        >>> grid = BlockGrid("q4_0")
        >>> blocks = grid.quantize(torch.arange(-8.0, 8.0).repeat(1, 2))
        >>> blocks.values[0, :4], blocks.encode().shape
        (tensor([-8., -7., -6., -5.]), torch.Size([1, 18]))
    """

    type: str

    def __post_init__(self) -> None:
        if self.type not in TYPES:
            raise RecipeError(
                f"{self.type} is no block type of ggml",
                remedy=did_you_mean(self.type, list(TYPES)) or f"choose from {', '.join(TYPES)}",
            )

    @property
    def table(self) -> BlockType:
        """Its row in the table of types."""
        return TYPES[self.type]

    @property
    def block(self) -> int:
        """Weights that share d."""
        return self.table.block

    @property
    def sub(self) -> int:
        """Weights that share an integer scale."""
        return self.table.sub

    @property
    def exact_zero(self) -> bool:
        """Whether 0 is a point of every sub-block's grid, so that a mask can be held."""
        return not self.table.has_minima and self.table.levels is None

    @property
    def bits_per_weight(self) -> float:
        """Bits of a weight, with its share of the scales."""
        return self.table.block_bytes * 8 / self.block

    def row_bytes(self, columns: int) -> int:
        """Bytes of a row.

        Raises:
            ShapeError: a row has no whole number of blocks.
        """
        if columns % self.block:
            raise ShapeError(
                f"a row of {columns} weights is no multiple of the {self.block} of a block of "
                f"{self.type}",
                remedy="choose a type with blocks of 32",
            )
        return columns // self.block * self.table.block_bytes

    def quantize(self, weight: Weight, importance: Tensor | None = None) -> Blocks:
        """Round a matrix with scales and minima that lower Σ_j h_ij (w_ij − ŵ_ij)².

        Args:
            weight: [..., out, in], any floating dtype.
            importance: h, broadcasts to the weight; 1 for every weight if not given.

        Raises:
            ShapeError: a row has no whole number of blocks.
            NumericalError: a weight is NaN or infinite.
        """
        self.row_bytes(weight.shape[-1])
        rows = weight.reshape(-1, weight.shape[-1])
        if not torch.isfinite(rows).all():
            raise not_finite(rows, self.type)
        if importance is None:
            importance = torch.ones(1, device=weight.device)
        each = importance.expand(weight.shape).reshape(rows.shape)
        step = max(1, AT_ONCE // max(1, rows.shape[1]))
        parts, shape = [], (-1, self.table.subs, self.sub)
        for start in range(0, len(rows), step):
            own, h = (x[start : start + step].float() for x in (rows, each))
            found = search(self.table, own.reshape(shape), h.reshape(shape))
            parts.append(Blocks.of(self, found, own))
        names = ("codes", "d", "scales", "d_min", "minima")
        joined = (torch.cat([getattr(part, name) for part in parts]) for name in names)
        return Blocks(self, *(part.reshape(*weight.shape[:-1], -1) for part in joined))


@dataclass(frozen=True)
class Blocks:
    """A matrix [..., out, in] in blocks; several with the same dimensions before are one.

    Attributes:
        grid: its type.
        codes: int8 [..., out, in]; for a table of levels the index.
        d: float16 [..., out, blocks].
        scales: s, int8 [..., out, sub-blocks].
        d_min: d′, float16 [..., out, blocks]; 0 where the type has no minimum.
        minima: m, int8 [..., out, sub-blocks].
    """

    grid: BlockGrid
    codes: Tensor
    d: Tensor
    scales: Tensor
    d_min: Tensor
    minima: Tensor

    @staticmethod
    def of(grid: BlockGrid, found: Found, weight: Weight) -> Blocks:
        """The nearest blocks of a weight [..., out, in] with the scales of its blocks in turn."""
        parts = (part.reshape(*weight.shape[:-1], -1) for part in found)
        dtypes = (torch.float16, torch.int8) * 2
        numbers = (part.to(dtype) for part, dtype in zip(parts, dtypes, strict=True))
        return Blocks(grid, torch.empty(0), *numbers).recoded(weight)

    @property
    def shape(self) -> torch.Size:
        """Of the matrix."""
        return self.codes.shape

    @property
    def scale(self) -> Tensor:
        """The scale d · s, float32 [..., out, sub-blocks]."""
        return self._spread(self.d).mul_(self.scales)

    @property
    def minimum(self) -> Tensor:
        """The minimum d′ · m, float32 [..., out, sub-blocks]."""
        return self._spread(self.d_min).mul_(self.minima)

    def _spread(self, numbers: Tensor) -> Tensor:
        """A number of each block for each of its sub-blocks, float32."""
        return numbers.float().repeat_interleave(self.grid.table.subs, dim=-1)

    @property
    def values(self) -> Weight:
        """The weights, float32 [..., out, in]."""
        return self._weights(self.grid.table.points(self.codes))

    def _weights(self, level: Tensor) -> Tensor:
        """The weights, in place of q."""
        scale, minimum = self.scale[..., None], self.minimum[..., None]
        self.grid.table.weights(self._subs(level), scale, minimum)
        return level

    def _subs(self, matrix: Tensor) -> Tensor:
        """A view [..., out, sub-blocks, weights of one]."""
        return matrix.unflatten(-1, (-1, self.grid.sub))

    def _positions(self, weight: Weight) -> Tensor:
        """(w + d′ m) / (d s), 0 where d s is 0, a new tensor."""
        parts = self._subs(weight.to(torch.float32, copy=True))
        if self.grid.table.has_minima:
            parts.add_(self.minimum[..., None])
        return parts.mul_(inverse(self.scale)[..., None]).flatten(-2)

    def recoded(self, weight: Weight) -> Blocks:
        """The nearest codes of another matrix with the same scales and minima."""
        table = self.grid.table
        return replace(self, codes=table.codes(table.level(self._positions(weight))))

    def nearest(self, weight: Weight) -> tuple[Weight, Tensor]:
        """The nearest weights with these scales and minima, and which weights are beyond them.

        Returns:
            float32 [..., out, in], and bool [..., out, in]: the nearest whole step is no code.
        """
        position = self._positions(weight)
        low, high = self.grid.table.ends
        beyond = (position < low - 0.5) | (position > high + 0.5)
        return self._weights(self.grid.table.level(position)), beyond

    def encode(self) -> Tensor:
        """The bytes of the type, uint8 [..., out, row_bytes]."""
        table = self.grid.table
        # Of all blocks in turn; m is stored as it is.
        integers = [_stored(self.scales, table.scales[0]).reshape(-1, table.subs)]
        if table.has_minima:
            integers.append(_stored(self.minima, 0).reshape(-1, table.subs))
        numbers = {
            "codes": _stored(self.codes, table.lowest).reshape(-1, table.block),
            "scales": torch.cat(integers, dim=1),
        }
        halves = {"d": self.d, "m": self.d_min}
        fields = [
            halves[field].reshape(-1).view(torch.uint8).view(-1, 2)
            if isinstance(field, str)
            else field.pack(numbers[field.of])
            for field in table.layout
        ]
        return torch.cat(fields, dim=1).reshape(*self.shape[:-1], -1)

    @staticmethod
    def decode(type: str, packed: Tensor) -> Blocks:
        """The blocks of bytes uint8 [..., out, row_bytes].

        Raises:
            RecipeError: there is no such type.
            CheckpointError: a row has no whole number of blocks.
        """
        grid, table = BlockGrid(type), BlockGrid(type).table
        if packed.shape[-1] % table.block_bytes:
            raise CheckpointError(
                f"a row of {packed.shape[-1]} bytes is no multiple of the {table.block_bytes} of a "
                f"block of {type}",
                remedy="check the type and the shape",
            )
        rest = packed.reshape(-1, table.block_bytes)
        found: dict[str, Tensor] = {}
        for field in table.layout:
            if isinstance(field, str):
                found[field], rest = rest[:, :2].contiguous().view(torch.float16), rest[:, 2:]
                continue
            width = table.count(field.of) * field.bits // 8
            bits, rest = field.unpack(rest[:, :width]), rest[:, width:]
            found[field.of] = found[field.of] | bits if field.of in found else bits
        d, none = found["d"], torch.zeros_like(found["d"])
        whole = d.new_ones(len(d), table.subs, dtype=torch.int8)
        s, m = whole * table.scales[0], whole * table.minima[0]
        if table.has_integers:
            integers = found["scales"].split(table.subs, dim=1)
            s, m = _read(integers[0], table.scales[0]), _read(integers[1], 0) if integers[1:] else m
        parts = (_read(found["codes"], table.lowest), d, s, found.get("m", none), m)
        return Blocks(grid, *(part.reshape(*packed.shape[:-1], -1) for part in parts))


def _stored(integers: Tensor, lowest: int) -> Tensor:
    """The bytes uint8 of integers int8: files count from the lowest, or store 8 bits as such."""
    return (integers if lowest == -128 else integers - lowest).view(torch.uint8)


def _read(stored: Tensor, lowest: int) -> Tensor:
    """The integers int8 of bytes uint8 that `_stored` made."""
    integers = stored.contiguous().view(torch.int8)
    return integers if lowest == -128 else integers + lowest
