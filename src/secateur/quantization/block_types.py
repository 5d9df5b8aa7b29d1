"""The block types of ggml: a table of their grids and of what their bytes hold.

    w = (d · s) · q − (d′ · m)

The table follows `ggml-common.h` and `ggml-quants.c` of llama.cpp.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

IQ4_LEVELS = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
"""The table of IQ4_NL and IQ4_XS."""


@dataclass(frozen=True)
class Plane:
    """Some bits of every code, or of every integer of the scales.

    A byte holds 8 / `bits` of them, from its lowest bit on. Byte j holds numbers j, j + stride,
    j + 2 · stride, …, and the bytes go on so in chunks of `stride`.

    Args:
        of: "codes" or "scales": these are the scales and then the minima.
        bits: 1, 2, 4 or 8.
        stride: the distance of two numbers in a byte.
        shift: the lowest of these bits in the number.
    """

    of: str
    bits: int
    stride: int
    shift: int = 0

    def pack(self, numbers: Tensor) -> Tensor:
        """Bytes [n, count · bits / 8] of numbers uint8 [n, count]."""
        lanes = numbers.view(len(numbers), -1, 8 // self.bits, self.stride)
        packed = torch.zeros_like(lanes[:, :, 0])
        for lane in range(lanes.shape[2]):
            part = (lanes[:, :, lane] >> self.shift) & (2**self.bits - 1)
            packed |= part << (lane * self.bits)
        return packed.flatten(1)

    def unpack(self, packed: Tensor) -> Tensor:
        """Numbers uint8 [n, count] with these bits only, of bytes [n, count · bits / 8]."""
        chunks = packed.reshape(len(packed), -1, 1, self.stride)
        shifts = torch.arange(0, 8, self.bits, dtype=torch.uint8, device=packed.device)[:, None]
        return (((chunks >> shifts) & (2**self.bits - 1)) << self.shift).flatten(1)


class _SixBits:
    """The scales and minima of Q4_K and Q5_K: 16 numbers of 6 bits in 12 bytes.

    The first 8 bytes are s₀ … s₃, m₀ … m₃, with the two highest bits of s₄ … s₇, m₄ … m₇ above
    them. The last 4 bytes are the low four bits of s₄ … s₇ below those of m₄ … m₇.
    """

    of, bits = "scales", 6

    def pack(self, numbers: Tensor) -> Tensor:
        s, t, m, n = numbers.split(4, dim=1)
        rest = (t & 15) | ((n & 15) << 4)
        return torch.cat([s | (t >> 4 << 6), m | (n >> 4 << 6), rest], dim=1)

    def unpack(self, packed: Tensor) -> Tensor:
        first, second, rest = packed.split(4, dim=1)
        t, n = (rest & 15) | (first >> 6 << 4), (rest >> 4) | (second >> 6 << 4)
        return torch.cat([first & 63, t, second & 63, n], dim=1)


@dataclass(frozen=True)
class BlockType:
    """One row of the table of types.

    Args:
        block: weights that share d.
        sub: weights that share s.
        lowest, highest: of the codes; for a table of levels, its first and last index.
        layout: what a block's bytes hold, in order: "d", "m" (d′) and planes.
        scales: the lowest and highest s.
        minima: the lowest and highest m; 0 where the type has none.
        levels: the table of levels, where codes are indices.
        unused: how many of the lowest codes are never chosen.
    """

    block: int
    sub: int
    lowest: int
    highest: int
    layout: tuple[Any, ...]
    scales: tuple[int, int] = (1, 1)
    minima: tuple[int, int] = (0, 0)
    levels: tuple[int, ...] | None = None
    unused: int = 0

    @property
    def has_minima(self) -> bool:
        """Whether a sub-block has a minimum."""
        return "m" in self.layout

    @property
    def subs(self) -> int:
        """How many sub-blocks a block has."""
        return self.block // self.sub

    @property
    def has_integers(self) -> bool:
        """Whether s, and m where there is one, can be chosen."""
        return self.scales != (1, 1)

    @property
    def ends(self) -> tuple[int, int]:
        """The lowest and highest q that are chosen."""
        if self.levels:
            return self.levels[0], self.levels[-1]
        return self.lowest + self.unused, self.highest

    @property
    def block_bytes(self) -> int:
        """Bytes of a block."""
        # d or d′ has 16 bits; a plane has its bits of each number.
        bits = sum(
            16 if isinstance(field, str) else field.bits * self.count(field.of)
            for field in self.layout
        )
        return bits // 8

    def count(self, of: str) -> int:
        """How many "codes", or integers of "scales" and minima, a block has."""
        return self.block if of == "codes" else (1 + self.has_minima) * self.subs

    def nearest(self, weights: Tensor, scale: Tensor, minimum: Tensor) -> Tensor:
        """The nearest q of weights, with scales and minima that broadcast to them."""
        reciprocal = inverse(scale)
        position = weights * reciprocal
        if self.has_minima:
            position += minimum * reciprocal
        return self.level(position)

    def weights(self, level: Tensor, scale: Tensor, minimum: Tensor) -> Tensor:
        """(d · s) · q − (d′ · m), in place of q."""
        level.mul_(scale)
        return level.sub_(minimum) if self.has_minima else level

    def level(self, position: Tensor) -> Tensor:
        """The nearest q to numbers of any shape, in place."""
        if self.levels is None:
            return position.round_().clamp_(self.lowest + self.unused, self.highest)
        # Half-way points of the table are multiples of 1/2, so a step of 1/2 has one nearest level.
        steps = position.mul_(2).floor_().clamp_(-256, 255).add_(256)
        return _looked_up(_tables(position.device).nearest, steps)

    def codes(self, level: Tensor) -> Tensor:
        """The codes int8 of points q."""
        if self.levels is None:
            return level.to(torch.int8)
        return _looked_up(_tables(level.device).codes, level - self.levels[0])

    def points(self, codes: Tensor) -> Tensor:
        """The points q of codes, float32."""
        if self.levels is None:
            return codes.float()
        return _looked_up(_tables(codes.device).levels, codes)


def _codes(bits: int, stride: int, shift: int = 0) -> Plane:
    return Plane("codes", bits, stride, shift)


def _scales(bits: int, stride: int, shift: int = 0) -> Plane:
    return Plane("scales", bits, stride, shift)


_NIBBLES, _SIX = _codes(4, 16), _SixBits()

TYPES: dict[str, BlockType] = {
    "q2_k": BlockType(
        256, 16, 0, 3, (_scales(4, 16), _codes(2, 32), "d", "m"), scales=(0, 15), minima=(0, 15)
    ),
    "q3_k": BlockType(
        256, 16, -4, 3,
        (_codes(1, 32, 2), _codes(2, 32), _scales(4, 8), _scales(2, 4, 4), "d"), scales=(-32, 31),
    ),
    "q4_k": BlockType(
        256, 32, 0, 15, ("d", "m", _SIX, _codes(4, 32)), scales=(0, 63), minima=(0, 63)
    ),
    "q5_k": BlockType(
        256, 32, 0, 31, ("d", "m", _SIX, _codes(1, 32, 4), _codes(4, 32)), scales=(0, 63),
        minima=(0, 63),
    ),
    "q6_k": BlockType(
        256, 16, -32, 31, (_codes(4, 64), _codes(2, 32, 4), _scales(8, 1), "d"), scales=(-128, 127)
    ),
    "iq4_nl": BlockType(32, 32, 0, 15, ("d", _NIBBLES), levels=IQ4_LEVELS),
    "iq4_xs": BlockType(
        256, 32, 0, 15, ("d", _scales(2, 1, 4), _scales(4, 1), _NIBBLES), scales=(-32, 31),
        levels=IQ4_LEVELS,
    ),
    "q4_0": BlockType(32, 32, -8, 7, ("d", _NIBBLES)),
    "q4_1": BlockType(32, 32, 0, 15, ("d", "m", _NIBBLES), minima=(-1, -1)),
    "q5_0": BlockType(32, 32, -16, 15, ("d", _codes(1, 1, 4), _NIBBLES)),
    "q5_1": BlockType(32, 32, 0, 31, ("d", "m", _codes(1, 1, 4), _NIBBLES), minima=(-1, -1)),
    "q8_0": BlockType(32, 32, -128, 127, ("d", _codes(8, 1)), unused=1),
}  # fmt: skip
"""The types by their names in lower case."""


def inverse(scale: Tensor) -> Tensor:
    """1 / scale, and 0 where it is 0."""
    return torch.where(scale == 0, 0.0, scale.reciprocal())


class _Tables(NamedTuple):
    """What IQ4 looks up.

    Attributes:
        levels: the level of each code.
        codes: the code of each level, from the lowest on.
        nearest: the level that is nearest to each step [k / 2, (k + 1) / 2), from k = −256 on.
    """

    levels: Tensor
    codes: Tensor
    nearest: Tensor


@cache
def _tables(device: torch.device) -> _Tables:
    levels = torch.tensor(IQ4_LEVELS, dtype=torch.float32)
    codes = torch.zeros(IQ4_LEVELS[-1] - IQ4_LEVELS[0] + 1, dtype=torch.int8)
    codes[levels.long() - IQ4_LEVELS[0]] = torch.arange(len(levels), dtype=torch.int8)
    middles = (levels[1:] + levels[:-1]) / 2
    nearest = levels[torch.bucketize(torch.arange(-256, 256) / 2, middles, right=True)]
    return _Tables(*(table.to(device) for table in (levels, codes, nearest)))


def _looked_up(table: Tensor, places: Tensor) -> Tensor:
    """The entries of a table at whole numbers of any shape."""
    return table.index_select(0, places.reshape(-1).int()).view(places.shape)
