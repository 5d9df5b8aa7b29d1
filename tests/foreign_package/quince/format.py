"""The places of the kept weights, and their values."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from secateur.errors import CheckpointError
from secateur.runtime.formats import Layout, PartSpec, formats, length_of, why_no_pattern
from secateur.runtime.formats.kept import as_stored, check_values, expand, scale_spec, select
from secateur.types import Mask, Weight


@dataclass(frozen=True)
class Positions:
    """Parts: `positions` int32 [nnz] in row-major order, `values` [nnz]; int8 adds the scales."""

    name: ClassVar[str] = "quince-positions"
    suffixes: ClassVar[tuple[str, ...]] = ("positions", "values", "weight_scale")
    automatic: ClassVar[bool] = False

    def candidates(self, nonzero: Mask, values: str, transposed: bool) -> list[Layout]:
        """One: it can hold any matrix."""
        out, columns = nonzero.shape
        return [Layout(self.name, values, (out, columns), transposed=transposed)]

    def why_not(self, layout: Layout) -> str | None:
        """It has no pattern."""
        return why_no_pattern(layout)

    def nonzeros(self, found: Mapping[str, PartSpec]) -> int:
        """The length of `values`."""
        return length_of(found.get("values"))

    def parts(self, layout: Layout, nonzeros: int) -> dict[str, PartSpec]:
        """Dtype and shape of the parts."""
        return {
            "positions": PartSpec(torch.int32, (nonzeros,)),
            "values": PartSpec(layout.dtype, (nonzeros,)),
            **scale_spec(layout),
        }

    def pack(self, weight: Weight, layout: Layout) -> dict[str, Tensor]:
        """The places and values of a matrix [out, in]."""
        mask, stored, scale = as_stored(weight, layout)
        places = mask.reshape(-1).nonzero()[:, 0].int()
        return {"positions": places, "values": select(stored, mask), **scale}

    def kept(self, parts: Mapping[str, Tensor], layout: Layout) -> tuple[Mask, Tensor]:
        """Mask [out, in] and values [nnz]."""
        mask = torch.zeros(layout.weights, dtype=torch.bool)
        mask[parts["positions"].long()] = True
        return mask.reshape(layout.shape), parts["values"]

    def unpack(self, parts: Mapping[str, Tensor], layout: Layout) -> Weight:
        """The matrix [out, in]."""
        return expand(*self.kept(parts, layout), parts.get("weight_scale"))

    def check(self, parts: Mapping[str, Tensor], layout: Layout) -> None:
        """Refuse places that do not rise, or lie outside the matrix."""
        check_values(parts, layout, "values")
        places = parts["positions"].long()
        inside = not len(places) or (int(places[0]) >= 0 and int(places[-1]) < layout.weights)
        if not inside or not bool((places.diff() > 0).all()):
            raise CheckpointError("the positions do not rise within the matrix")

    def nbytes(self, layout: Layout, nonzeros: int) -> int:
        """Four bytes and a value for each kept weight."""
        return sum(spec.nbytes for spec in self.parts(layout, nonzeros).values())


formats.register(Positions.name)(Positions())
