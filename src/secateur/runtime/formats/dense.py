"""Dense: every weight is stored, where packing does not pay."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from secateur.errors import CheckpointError
from secateur.quantization.blocks import Blocks
from secateur.runtime import formats as packing
from secateur.runtime.formats import Layout, PartSpec, formats
from secateur.runtime.formats import kept as shared
from secateur.types import Mask, Weight


class Dense(packing.Format):
    """Parts: `weight` [out, in], and the scales of integers.

    int4, int3 and int2 have a bit stream for each row: `weight` uint8 [out, ceil(in · bits / 8)].
    The types of llama.cpp have one part, `blocks` uint8 [out, bytes of a row], as in a GGUF file.

    Example:
        >>> import torch
        >>> from secateur.runtime.formats import Layout, formats
        >>> formats["dense"].pack(torch.tensor([[12.7, 0.0]]), Layout("dense", "int8", (1, 2)))
        {'weight': tensor([[127,   0]], dtype=torch.int8), 'weight_scale': tensor([0.1000])}
    """

    name: ClassVar[str] = "dense"
    suffixes: ClassVar[tuple[str, ...]] = ("weight", "weight_scale", "weight_exponent", "blocks")

    def parts(self, layout: Layout, nonzeros: int) -> dict[str, PartSpec]:
        """Dtype and shape of the parts."""
        if layout.blocks is not None:
            out, columns = layout.shape
            return {"blocks": PartSpec(torch.uint8, (out, layout.blocks.row_bytes(columns)))}
        return {"weight": packing.value_spec(layout, *layout.shape), **shared.scale_specs(layout)}

    def pack(self, weight: Weight, layout: Layout) -> dict[str, Tensor]:
        """The matrix itself, cast or quantized."""
        if layout.blocks is not None:
            return {"blocks": layout.blocks.quantize(weight).encode().cpu()}
        _, stored, scales = shared.as_stored(weight, layout)
        return {"weight": packing.encode_values(stored, layout), **scales}

    def kept(self, parts: Mapping[str, Tensor], layout: Layout) -> tuple[Mask, Tensor]:
        """The weights with a bit of 1."""
        values = self._values(parts, layout)
        mask = shared.kept_mask(values)
        return mask, shared.select(values, mask)

    def unpack(self, parts: Mapping[str, Tensor], layout: Layout) -> Weight:
        """The matrix [out, in]."""
        return shared.dequantized(self._values(parts, layout), parts, layout)

    def check(self, parts: Mapping[str, Tensor], layout: Layout) -> None:
        """Refuse parts, scales and values that do not fit the layout."""
        shared.check_parts(parts, layout)
        if layout.blocks is None:
            shared.check_values(parts["weight"], layout, layout.shape[1])
        elif odd := int((~torch.isfinite(self._values(parts, layout))).sum()):
            raise CheckpointError(f"{odd} weights of {layout.values} are NaN or infinite")

    def _values(self, parts: Mapping[str, Tensor], layout: Layout) -> Tensor:
        """The weights [out, in], or their integers."""
        if layout.blocks is not None:
            return Blocks.decode(layout.values, parts["blocks"]).values
        return shared.decode_values(parts["weight"], layout, layout.shape[1])


formats.register(Dense.name)(Dense())
