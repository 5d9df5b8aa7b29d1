"""Dense: every weight is stored, where packing does not pay."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from torch import Tensor

from secateur.runtime import formats as packing
from secateur.runtime.formats import Layout, PartSpec, formats
from secateur.runtime.formats import kept as shared
from secateur.types import Mask, Weight


class Dense(packing.Format):
    """Parts: `weight` [out, in], and the scales of integers.

    int4, int3 and int2 have a bit stream for each row: `weight` uint8 [out, ceil(in · bits / 8)].

    Example:
        >>> import torch
        >>> from secateur.runtime.formats import Layout, formats
        >>> formats["dense"].pack(torch.tensor([[12.7, 0.0]]), Layout("dense", "int8", (1, 2)))
        {'weight': tensor([[127,   0]], dtype=torch.int8), 'weight_scale': tensor([0.1000])}
    """

    name: ClassVar[str] = "dense"
    suffixes: ClassVar[tuple[str, ...]] = ("weight", "weight_scale", "weight_exponent")

    def parts(self, layout: Layout, nonzeros: int) -> dict[str, PartSpec]:
        """Dtype and shape of the parts."""
        return {"weight": packing.value_spec(layout, *layout.shape), **shared.scale_specs(layout)}

    def pack(self, weight: Weight, layout: Layout) -> dict[str, Tensor]:
        """The matrix itself, cast or quantized."""
        _, stored, scales = shared.as_stored(weight, layout)
        return {"weight": packing.encode_values(stored, layout), **scales}

    def kept(self, parts: Mapping[str, Tensor], layout: Layout) -> tuple[Mask, Tensor]:
        """The weights with a bit of 1."""
        values = shared.decode_values(parts["weight"], layout, layout.shape[1])
        mask = shared.kept_mask(values)
        return mask, shared.select(values, mask)

    def unpack(self, parts: Mapping[str, Tensor], layout: Layout) -> Weight:
        """The matrix [out, in]."""
        values = shared.decode_values(parts["weight"], layout, layout.shape[1])
        return shared.dequantized(values, parts, layout)

    def check(self, parts: Mapping[str, Tensor], layout: Layout) -> None:
        """Refuse parts, scales and values that do not fit the layout."""
        shared.check_parts(parts, layout)
        shared.check_values(parts["weight"], layout, layout.shape[1])


formats.register(Dense.name)(Dense())
