"""Keys and values of several sequences, laid out for the kernels (`csrc/secateur.h`)."""

from __future__ import annotations

from types import MappingProxyType

import torch
from jaxtyping import UInt8
from torch import Tensor

from secateur.errors import RecipeError

TILE = 64
"""Positions of a tile."""

UNIT = 4
"""Bytes of the values that stand together."""


CACHES = MappingProxyType({"bf16": torch.bfloat16, "int8": torch.int8})
"""The types that `--kv-cache` names."""


def cache_dtype(named: str | None, model: torch.dtype) -> torch.dtype:
    """The type of keys and values for activations of some type.

    Raises:
        RecipeError: there is no type of this name.
    """
    if named is None:
        return torch.bfloat16 if model == torch.bfloat16 else torch.float32
    if named not in CACHES:
        raise RecipeError(f"kv_cache {named!r}", remedy=f"give one of {', '.join(CACHES)}")
    return CACHES[named]


def refuse_cache(named: str | None, reason: str) -> None:
    """Refuse a type of the cache where transformers decodes.

    Raises:
        RecipeError: a type is given.
    """
    if named is not None:
        raise RecipeError(
            f"--kv-cache {named}: transformers decodes this model, because {reason}",
            where="--kv-cache",
            remedy="leave it out",
        )


class KeyValueCache:
    """Keys and values of all layers and sequences.

    Args:
        dtype: of the values: float32, bfloat16, or int8 with a scale for each position and head.
        layers: of the model.
        slots: how many sequences have a place. Memory is used when it is filled.
        groups: heads of keys and values.
        capacity: positions of a slot.
        head: columns of a head.
    """

    def __init__(
        self, dtype: torch.dtype, *, layers: int, slots: int, groups: int, capacity: int, head: int
    ) -> None:
        self.dtype = dtype
        self.width = -(-head // 16) * 16
        self.code_bytes = TILE * self.width * dtype.itemsize
        tile_bytes = self.code_bytes + (UNIT * TILE if dtype == torch.int8 else 0)
        shape = (2, layers, slots, groups, -(-capacity // TILE), tile_bytes)
        self.tiles = torch.zeros(shape, dtype=torch.uint8)

    @property
    def nbytes(self) -> int:
        """The memory when all slots are full."""
        return self.tiles.nbytes

    def addresses(self, layer: int) -> tuple[int, int]:
        """Where keys and values of a layer are."""
        return self.tiles[0, layer].data_ptr(), self.tiles[1, layer].data_ptr()

    def rows(
        self, slot: int, begin: int, end: int
    ) -> UInt8[Tensor, "2 layers groups positions row"]:
        """A copy of the bytes of some positions: their values, then their scale if any."""
        at = torch.arange(begin, end)
        tile, place, n = at // TILE, at % TILE, UNIT // self.dtype.itemsize
        keys, values, scales = self._views(slot)
        found = keys[:, :, tile, place], values[:, :, tile, place // n, place % n]
        rows = torch.stack([x.flatten(-2) for x in found])
        return torch.cat([rows, scales[:, :, :, tile, place]], -1)

    def put_rows(
        self, slot: int, begin: int, rows: UInt8[Tensor, "2 layers groups positions row"]
    ) -> None:
        """Write what `rows` gave at the same positions."""
        at = torch.arange(begin, begin + rows.shape[3])
        tile, place, n = at // TILE, at % TILE, UNIT // self.dtype.itemsize
        keys, values, scales = self._views(slot)
        codes = rows[..., : self.width * self.dtype.itemsize]
        keys[:, :, tile, place] = codes[0].unflatten(-1, (-1, UNIT))
        values[:, :, tile, place // n, place % n] = codes[1].unflatten(-1, (self.width, -1))
        scales[:, :, :, tile, place] = rows[..., codes.shape[-1] :]

    def _views(self, slot: int) -> tuple[Tensor, Tensor, Tensor]:
        """Keys, values and scales of a slot by positions: see csrc/secateur.h."""
        size = self.dtype.itemsize
        codes, scales = self.tiles[:, :, slot].tensor_split([self.code_bytes], -1)
        keys = codes[0].unflatten(-1, (-1, TILE, UNIT)).transpose(-3, -2)
        shape = (-1, self.width, UNIT // size, size)
        values = codes[1].unflatten(-1, shape).transpose(-3, -2)
        return keys, values, scales.unflatten(-1, (TILE, -1))
