"""Dense: every weight is stored, where packing does not pay."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from secateur.quantization.int8 import dequantize_rows
from secateur.runtime.formats import Layout, PartSpec, formats, why_no_pattern
from secateur.runtime.formats.kept import as_stored, check_values, kept_mask, scale_spec, select
from secateur.types import Mask, Weight

__all__ = ["Dense"]


@dataclass(frozen=True)
class Dense:
    """Parts: `weight` [out, in]; for int8 also `weight_scale` float32 [out].

    Example:
        >>> import torch
        >>> from secateur.runtime.formats import Layout, formats
        >>> formats["dense"].pack(torch.tensor([[12.7, 0.0]]), Layout("dense", "int8", (1, 2)))
        {'weight': tensor([[127,   0]], dtype=torch.int8), 'weight_scale': tensor([0.1000])}
    """

    name: ClassVar[str] = "dense"
    suffixes: ClassVar[tuple[str, ...]] = ("weight", "weight_scale")
    automatic: ClassVar[bool] = True

    def candidates(self, nonzero: Mask, values: str, transposed: bool) -> list[Layout]:
        """One: it can hold any matrix."""
        out, columns = nonzero.shape
        return [Layout(self.name, values, (out, columns), transposed=transposed)]

    def why_not(self, layout: Layout) -> str | None:
        """It has no pattern."""
        return why_no_pattern(layout)

    def nonzeros(self, found: Mapping[str, PartSpec]) -> int:
        """0: the shape fixes all sizes."""
        return 0

    def parts(self, layout: Layout, nonzeros: int) -> dict[str, PartSpec]:
        """Dtype and shape of the parts."""
        return {"weight": PartSpec(layout.dtype, layout.shape), **scale_spec(layout)}

    def pack(self, weight: Weight, layout: Layout) -> dict[str, Tensor]:
        """The matrix itself, cast or quantized."""
        _, stored, scale = as_stored(weight, layout)
        return {"weight": stored, **scale}

    def kept(self, parts: Mapping[str, Tensor], layout: Layout) -> tuple[Mask, Tensor]:
        """The weights with a bit of 1."""
        mask = kept_mask(parts["weight"])
        return mask, select(parts["weight"], mask)

    def unpack(self, parts: Mapping[str, Tensor], layout: Layout) -> Weight:
        """The matrix [out, in]."""
        if layout.values == "int8":
            return dequantize_rows(parts["weight"], parts["weight_scale"])
        return parts["weight"]

    def check(self, parts: Mapping[str, Tensor], layout: Layout) -> None:
        """Refuse wrong parts, dtypes and shapes, -128, and scales that are not positive."""
        check_values(parts, layout, "weight")

    def nbytes(self, layout: Layout, nonzeros: int) -> int:
        """Bytes: out · in · bytes of a value, and 4 · out for int8."""
        return sum(spec.nbytes for spec in self.parts(layout, nonzeros).values())


formats.register(Dense.name)(Dense())
