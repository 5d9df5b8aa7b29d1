"""Keys and values of several sequences, laid out for the kernels (`csrc/secateur.h`)."""

from __future__ import annotations

import math
import mmap
import sys
from collections.abc import Sequence
from types import MappingProxyType

import torch
from jaxtyping import UInt8
from torch import Tensor

from secateur.models.shape import TILE, held_positions

UNIT = 4
"""Bytes of the values that stand together."""


CACHES = MappingProxyType({"bf16": torch.bfloat16, "int8": torch.int8})
"""The types that `--kv-cache` names."""


def cache_dtype(named: str | None, model: torch.dtype) -> torch.dtype:
    """The type of keys and values for activations of some type."""
    if named is None:
        return torch.bfloat16 if model == torch.bfloat16 else torch.float32
    return CACHES[named]


def unused_zeros(shape: Sequence[int]) -> UInt8[Tensor, "..."]:
    """Zeros that take memory, page by page, only where something is written."""
    private = {} if sys.platform == "win32" else {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS}
    return torch.frombuffer(mmap.mmap(-1, math.prod(shape), **private), dtype=torch.uint8).view(
        shape
    )


class KeyValueCache:
    """Keys and values of all layers and sequences.

    Position p of a slot is in tile p // 64 modulo the tiles of the layer. A layer with a window has
    a ring of tiles: what leaves the window makes room for what comes. `models.shape.held_positions`
    says how many positions a layer has room for.

    Args:
        dtype: of the values: float32, bfloat16, or int8 with a scale for each position and head.
        windows: keys that a token of each layer sees, its own among them; 0: all.
        slots: how many sequences have a place. Memory is used when it is filled.
        groups: heads of keys and values.
        capacity: positions of a slot.
        head: columns of a head.
    """

    def __init__(
        self,
        dtype: torch.dtype,
        *,
        windows: Sequence[int],
        slots: int,
        groups: int,
        capacity: int,
        head: int,
    ) -> None:
        self.dtype, self.windows = dtype, windows
        self.width = -(-head // 16) * 16
        self.code_bytes = TILE * self.width * dtype.itemsize
        tile_bytes = self.code_bytes + (UNIT * TILE if dtype == torch.int8 else 0)
        self.tiles: dict[int, Tensor] = {}
        """By window: [keys and values, layers, slots, groups, tiles, bytes]."""
        for window in dict.fromkeys(windows):
            count = held_positions(capacity, window) // TILE
            shape = (2, list(windows).count(window), slots, groups, count, tile_bytes)
            self.tiles[window] = unused_zeros(shape)

    @property
    def nbytes(self) -> int:
        """The memory when all slots are full."""
        return sum(tiles.nbytes for tiles in self.tiles.values())

    def place(self, layer: int) -> tuple[int, int, int]:
        """Where keys and values of a layer are, and its tiles of a slot and group."""
        window = self.windows[layer]
        tiles = self.tiles[window][:, self.windows[:layer].count(window)]
        return tiles[0].data_ptr(), tiles[1].data_ptr(), tiles.shape[3]

    def oldest(self, window: int, reached: int) -> int:
        """The first position that layers with a window hold after so many were written."""
        return TILE * max(0, (reached - 1) // TILE + 1 - self.tiles[window].shape[4])

    def goes_on(self, reached: int, length: int) -> bool:
        """Whether a text can go on after its first `length` tokens, when `reached` were written."""
        return all(max(0, length + 1 - w) >= self.oldest(w, reached) for w in self.tiles if w)

    def rows(
        self, slot: int, begin: int, end: int
    ) -> UInt8[Tensor, "2 layers groups positions row"]:
        """A copy of the bytes of some positions: their values, then their scale if any.

        Layers with the same window stand together.
        """
        found = []
        for window in self.tiles:
            tile, place, n = self._places(window, begin, end)
            keys, values, scales = self._views(window, slot)
            both = keys[:, :, tile, place], values[:, :, tile, place // n, place % n]
            rows = torch.stack([x.flatten(-2) for x in both])
            found.append(torch.cat([rows, scales[:, :, :, tile, place]], -1))
        return torch.cat(found, 1)

    def put_rows(
        self, slot: int, begin: int, rows: UInt8[Tensor, "2 layers groups positions row"]
    ) -> None:
        """Write what `rows` gave at the same positions."""
        layers = [tiles.shape[1] for tiles in self.tiles.values()]
        for window, own in zip(self.tiles, rows.split(layers, 1), strict=True):
            tile, place, n = self._places(window, begin, begin + rows.shape[3])
            keys, values, scales = self._views(window, slot)
            codes = own[..., : self.width * self.dtype.itemsize]
            keys[:, :, tile, place] = codes[0].unflatten(-1, (-1, UNIT))
            values[:, :, tile, place // n, place % n] = codes[1].unflatten(-1, (self.width, -1))
            scales[:, :, :, tile, place] = own[..., codes.shape[-1] :]

    def _places(self, window: int, begin: int, end: int) -> tuple[Tensor, Tensor, int]:
        """Tile and place in it of some positions, and the values that stand together in a unit."""
        at = torch.arange(begin, end)
        return at // TILE % self.tiles[window].shape[4], at % TILE, UNIT // self.dtype.itemsize

    def _views(self, window: int, slot: int) -> tuple[Tensor, Tensor, Tensor]:
        """Keys, values and scales of a slot by positions: see csrc/secateur.h."""
        size = self.dtype.itemsize
        codes, scales = self.tiles[window][:, :, slot].tensor_split([self.code_bytes], -1)
        keys = codes[0].unflatten(-1, (-1, TILE, UNIT)).transpose(-3, -2)
        shape = (-1, self.width, UNIT // size, size)
        values = codes[1].unflatten(-1, shape).transpose(-3, -2)
        return keys, values, scales.unflatten(-1, (TILE, -1))
