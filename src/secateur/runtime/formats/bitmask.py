"""Bitmask: one bit for every weight, and the values of the kept ones."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from secateur.errors import CheckpointError
from secateur.runtime.formats import Layout, PartSpec, formats, length_of, why_no_pattern
from secateur.runtime.formats.bits import (
    count_bits,
    pack_bits,
    padding_bits,
    row_bytes,
    unpack_bits,
)
from secateur.runtime.formats.kept import as_stored, check_values, expand, scale_spec, select
from secateur.types import Mask, Weight

__all__ = ["Bitmask"]


@dataclass(frozen=True)
class Bitmask:
    """Parts: `bitmask` uint8 [out, ceil(in / 8)], `compressed` [nnz] in row-major order.

    Bit j of a row (bit j mod 8 of byte j / 8, lowest first) is 1 where weight j is kept; bits
    past `in` are 0. int8 adds `weight_scale` float32 [out]. A row's values begin where those of the
    row before it end; the mask determines this place, so it is not stored.

    Example:
        >>> import torch
        >>> from secateur.runtime.formats import Layout, formats
        >>> weight = torch.tensor([[0.0, 3.0, 0.0, 0.0, -1.0, 0.0, 0.0, 0.0, 0.0, 2.0]])
        >>> layout = Layout("bitmask", "float32", (1, 10))
        >>> formats["bitmask"].pack(weight, layout)
        {'bitmask': tensor([[18,  2]], dtype=torch.uint8), 'compressed': tensor([ 3., -1.,  2.])}
        >>> formats["bitmask"].nbytes(layout, nonzeros=3)
        14
    """

    name: ClassVar[str] = "bitmask"
    suffixes: ClassVar[tuple[str, ...]] = ("bitmask", "compressed", "weight_scale")
    automatic: ClassVar[bool] = True

    def candidates(self, nonzero: Mask, values: str, transposed: bool) -> list[Layout]:
        """One: it can hold any matrix."""
        out, columns = nonzero.shape
        return [Layout(self.name, values, (out, columns), transposed=transposed)]

    def why_not(self, layout: Layout) -> str | None:
        """It has no pattern."""
        return why_no_pattern(layout)

    def nonzeros(self, found: Mapping[str, PartSpec]) -> int:
        """The length of `compressed`."""
        return length_of(found.get("compressed"))

    def parts(self, layout: Layout, nonzeros: int) -> dict[str, PartSpec]:
        """Dtype and shape of the parts."""
        out, columns = layout.shape
        return {
            "bitmask": PartSpec(torch.uint8, (out, row_bytes(columns))),
            "compressed": PartSpec(layout.dtype, (nonzeros,)),
            **scale_spec(layout),
        }

    def pack(self, weight: Weight, layout: Layout) -> dict[str, Tensor]:
        """Mask and kept values of a matrix [out, in]."""
        mask, stored, scale = as_stored(weight, layout)
        return {"bitmask": pack_bits(mask), "compressed": select(stored, mask), **scale}

    def kept(self, parts: Mapping[str, Tensor], layout: Layout) -> tuple[Mask, Tensor]:
        """Mask [out, in] and values [nnz]."""
        return unpack_bits(parts["bitmask"], layout.shape[1]), parts["compressed"]

    def unpack(self, parts: Mapping[str, Tensor], layout: Layout) -> Weight:
        """The matrix [out, in]."""
        return expand(*self.kept(parts, layout), parts.get("weight_scale"))

    def check(self, parts: Mapping[str, Tensor], layout: Layout) -> None:
        """Refuse also a mask with another number of bits than there are values, or past a row."""
        check_values(parts, layout, "compressed")
        mask, values = parts["bitmask"], parts["compressed"]
        beyond = padding_bits(mask, layout.shape[1])
        if beyond:
            raise CheckpointError(
                f"{beyond} bits of the mask are set past the {layout.shape[1]} weights of a row"
            )
        if count_bits(mask) != values.numel():
            raise CheckpointError(
                f"the mask keeps {count_bits(mask)} weights, but there are {values.numel()} values"
            )

    def nbytes(self, layout: Layout, nonzeros: int) -> int:
        """Bytes: out · ceil(in / 8) + nnz · bytes of a value, and 4 · out for int8."""
        return sum(spec.nbytes for spec in self.parts(layout, nonzeros).values())


formats.register(Bitmask.name)(Bitmask())
