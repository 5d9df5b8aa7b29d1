"""The places of the kept weights, and their values."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from secateur.errors import CheckpointError
from secateur.runtime.formats import (
    Layout,
    PartSpec,
    encode_values,
    formats,
    length_of,
    value_spec,
    why_no_pattern,
)
from secateur.runtime.formats.kept import (
    as_stored,
    check_parts,
    check_values,
    decode_values,
    expand,
    scale_specs,
    select,
)
from secateur.types import Mask, Weight


@dataclass(frozen=True)
class Positions:
    """Parts: `positions` int32 [nnz] in row-major order, `values` [nnz], and scales."""

    name: ClassVar[str] = "quince-positions"
    suffixes: ClassVar[tuple[str, ...]] = ("positions", "values", "weight_scale", "weight_exponent")
    automatic: ClassVar[bool] = False

    def candidates(self, nonzero: Mask, dense: Layout) -> list[Layout]:
        """One: it can hold any matrix."""
        return [replace(dense, format=self.name)]

    def why_not(self, layout: Layout) -> str | None:
        """It has no pattern."""
        return why_no_pattern(layout)

    def nonzeros(self, found: Mapping[str, PartSpec], layout: Layout) -> int:
        """The number of positions."""
        return length_of(found.get("positions"))

    def parts(self, layout: Layout, nonzeros: int) -> dict[str, PartSpec]:
        """Dtype and shape of the parts."""
        return {
            "positions": PartSpec(torch.int32, (nonzeros,)),
            "values": value_spec(layout, nonzeros),
            **scale_specs(layout),
        }

    def pack(self, weight: Weight, layout: Layout) -> dict[str, Tensor]:
        """The places and values of a matrix [out, in]."""
        mask, stored, scales = as_stored(weight, layout)
        places = mask.reshape(-1).nonzero()[:, 0].int()
        values = encode_values(select(stored, mask), layout)
        return {"positions": places, "values": values, **scales}

    def kept(self, parts: Mapping[str, Tensor], layout: Layout) -> tuple[Mask, Tensor]:
        """Mask [out, in] and values [nnz]."""
        mask = torch.zeros(layout.weights, dtype=torch.bool)
        mask[parts["positions"].long()] = True
        values = decode_values(parts["values"], layout, len(parts["positions"]))
        return mask.reshape(layout.shape), values

    def unpack(self, parts: Mapping[str, Tensor], layout: Layout) -> Weight:
        """The matrix [out, in]."""
        return expand(*self.kept(parts, layout), parts, layout)

    def check(self, parts: Mapping[str, Tensor], layout: Layout) -> None:
        """Refuse places that do not rise, or lie outside the matrix."""
        check_parts(parts, layout)
        check_values(parts["values"], layout, len(parts["positions"]))
        places = parts["positions"].long()
        inside = not len(places) or (int(places[0]) >= 0 and int(places[-1]) < layout.weights)
        if not inside or not bool((places.diff() > 0).all()):
            raise CheckpointError("the positions do not rise within the matrix")

    def nbytes(self, layout: Layout, nonzeros: int) -> int:
        """Four bytes and a value for each kept weight."""
        return sum(spec.nbytes for spec in self.parts(layout, nonzeros).values())


formats.register(Positions.name)(Positions())
