"""Chooses the smallest layout for a matrix: bitmask, N:M, or dense where packing does not pay."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from secateur.errors import CheckpointError, RecipeError
from secateur.quantization.groups import GROUPS
from secateur.registry import did_you_mean
from secateur.runtime.formats import GRID_BITS, VALUES, Layout, formats
from secateur.runtime.formats.kept import kept_mask

AUTO = "auto"
DENSE = "dense"
"""The format that holds any matrix, taken where no other is smaller."""
KEEP = "keep"
"""Values in the dtype of the source, so that no number changes."""
DEFAULT_GROUP = 64
"""How many weights of a row share a scale in int4 and int3."""
WITHOUT_LOSS = {
    torch.float32: "float32",
    torch.bfloat16: "bfloat16",
    torch.float16: "float16",
    torch.float64: "float32",
}
"""The stored dtypes with `keep`: unchanged, except float64, in which no runtime computes."""


@dataclass(frozen=True)
class LayoutChoice:
    """How one matrix will be stored.

    Attributes:
        layout: its layout.
        nonzeros: weights that are not zero.
        negative_zeros: zeros stored as −0.0.
        nbytes: the bytes of its parts.
        offered: whether an allowed format other than `dense` could store the matrix.
    """

    layout: Layout
    nonzeros: int
    negative_zeros: int
    nbytes: int
    offered: bool = False


def check_names(format: str, values: str, group: int | None = None) -> None:
    """Refuse unknown names of formats or values, and a group size that has no effect.

    Raises:
        RecipeError: names the available ones.
    """
    known = {"format": (format, [AUTO, *formats]), "values": (values, [AUTO, KEEP, *VALUES])}
    for kind, (name, names) in known.items():
        if name not in names:
            raise RecipeError(f"unknown {kind} {name!r}", remedy=did_you_mean(name, names))
    if group is not None and group not in GROUPS:
        raise RecipeError(
            f"there are no groups of {group}", remedy=f"use {', '.join(map(str, GROUPS))}"
        )
    if group is not None and values not in GRID_BITS:
        raise RecipeError(
            f"a group size of {group} is for {' and '.join(GRID_BITS)}, but the values are "
            f"{values!r}",
            remedy="add --values int4, or leave --group-size out",
        )


def values_for(dtype: torch.dtype, requested: str, name: str) -> str:
    """The dtype in which the weights of a matrix are stored.

    Raises:
        CheckpointError: a plain checkpoint does not have this dtype.
    """
    if dtype not in WITHOUT_LOSS:
        raise CheckpointError(
            f"weights of {dtype} cannot be packed",
            where=name,
            remedy="name the checkpoint in float32, bfloat16 or float16, before quantization",
        )
    return WITHOUT_LOSS[dtype] if requested == KEEP else requested


def _group_of(values: str, group: int | None) -> int | None:
    """The group size of a layout with these values: None where there are no groups."""
    return (group or DEFAULT_GROUP) if values in GRID_BITS else None


def without_negative_zeros(weight: Tensor) -> Tensor:
    """The same weights with every zero stored as +0.0; products with either zero are the same.

    Pruning by multiplication with a mask leaves −0.0 where weights were negative, and a format
    keeps every value except +0.0.
    """
    return weight.masked_fill(weight == 0, 0.0)


def choose_layout(
    weight: Tensor, *, format: str, values: str, transposed: bool = False, group: int | None = None
) -> LayoutChoice:
    """The smallest layout for a matrix among the allowed ones; dense is always allowed.

    Args:
        weight: [out, in], as in the source.
        format: `auto`, or a name in `formats`: that format or dense.
        values: a name in `VALUES`.
        transposed: whether the source stores [in, out].
        group: the weights of a row that share a scale, for int4 and int3.
    """
    out, columns = weight.shape
    dense = Layout(
        DENSE, values, (out, columns), transposed=transposed, group=_group_of(values, group)
    )
    stored = (weight if dense.integers else weight.to(dense.dtype)).contiguous()
    nonzero = stored != 0
    nonzeros = int(torch.count_nonzero(nonzero))
    negative_zeros = int(torch.count_nonzero(kept_mask(stored))) - nonzeros
    layouts = [dense]
    offered = [
        layout
        for name in formats
        if name != DENSE and (name == format or (format == AUTO and formats[name].automatic))
        for layout in formats[name].candidates(nonzero, dense)
    ]
    layouts += offered
    sizes = [formats[layout.format].nbytes(layout, nonzeros) for layout in layouts]
    best = min(range(len(layouts)), key=sizes.__getitem__)
    return LayoutChoice(layouts[best], nonzeros, negative_zeros, sizes[best], bool(offered))
