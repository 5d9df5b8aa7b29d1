"""Bitmask: one bit for every weight, and the values of the kept ones."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from secateur.errors import CheckpointError
from secateur.runtime import formats as packing
from secateur.runtime.formats import Layout, PartSpec, bits, formats
from secateur.runtime.formats import kept as shared
from secateur.types import Mask, Weight


class Bitmask(packing.Format):
    """Parts: `bitmask` uint8 [out, ceil(in / 8)], `compressed` [nnz] in row-major order.

    Bit j of a row (bit j mod 8 of byte j / 8, lowest first) is 1 where weight j is kept; bits
    past `in` are 0. Integers add their scales. A row's values begin where those of the row before
    it end; the mask determines this place, so it is not stored. int4, int3 and int2 are one stream:
    `compressed` uint8 [ceil(nnz · bits / 8)].

    Example:
        >>> import torch
        >>> from secateur.runtime.formats import Layout, formats, stored_bytes
        >>> weight = torch.tensor([[0.0, 3.0, 0.0, 0.0, -1.0, 0.0, 0.0, 0.0, 0.0, 2.0]])
        >>> layout = Layout("bitmask", "float32", (1, 10))
        >>> formats["bitmask"].pack(weight, layout)
        {'bitmask': tensor([[18,  2]], dtype=torch.uint8), 'compressed': tensor([ 3., -1.,  2.])}
        >>> stored_bytes(layout, nonzeros=3)
        14
    """

    name: ClassVar[str] = "bitmask"
    suffixes: ClassVar[tuple[str, ...]] = (
        "bitmask",
        "compressed",
        "weight_scale",
        "weight_exponent",
    )

    def nonzeros(self, found: Mapping[str, PartSpec], layout: Layout) -> int:
        """The number of values in `compressed`, the smallest possible for a bit stream."""
        return shared.fewest_values(packing.length_of(found.get("compressed")), layout)

    def parts(self, layout: Layout, nonzeros: int) -> dict[str, PartSpec]:
        """Dtype and shape of the parts."""
        out, columns = layout.shape
        return {
            "bitmask": PartSpec(torch.uint8, (out, bits.row_bytes(columns))),
            "compressed": packing.value_spec(layout, nonzeros),
            **shared.scale_specs(layout),
        }

    def pack(self, weight: Weight, layout: Layout) -> dict[str, Tensor]:
        """Mask and kept values of a matrix [out, in]."""
        mask, stored, scales = shared.as_stored(weight, layout)
        values = packing.encode_values(shared.select(stored, mask), layout)
        return {"bitmask": bits.pack_bits(mask), "compressed": values, **scales}

    def kept(self, parts: Mapping[str, Tensor], layout: Layout) -> tuple[Mask, Tensor]:
        """Mask [out, in] and values [nnz]."""
        count = bits.count_bits(parts["bitmask"])
        values = shared.decode_values(parts["compressed"], layout, count)
        return bits.unpack_bits(parts["bitmask"], layout.shape[1]), values

    def unpack(self, parts: Mapping[str, Tensor], layout: Layout) -> Weight:
        """The matrix [out, in]."""
        return shared.expand(*self.kept(parts, layout), parts, layout)

    def check(self, parts: Mapping[str, Tensor], layout: Layout) -> None:
        """Refuse also a mask with another number of bits than there are values, or past a row."""
        shared.check_parts(parts, layout)
        mask, values = parts["bitmask"], parts["compressed"]
        if beyond := bits.padding_bits(mask, layout.shape[1]):
            raise CheckpointError(
                f"{beyond} bits of the mask are set past the {layout.shape[1]} weights of a row"
            )
        count = bits.count_bits(mask)
        # of a bit stream only the bytes are known, so the bits of the mask are the count
        (needed,) = packing.value_spec(layout, count).shape
        if needed != values.numel():
            raise CheckpointError(
                f"the mask keeps {count} weights, but there are {values.numel()} "
                + ("values" if layout.grid is None else f"bytes of values, not {needed}")
            )
        shared.check_values(values, layout, count)


formats.register(Bitmask.name)(Bitmask())
