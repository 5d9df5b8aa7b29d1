"""Chooses the smallest layout for a matrix: bitmask, N:M, or dense where packing does not pay."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from secateur.errors import CheckpointError, RecipeError
from secateur.quantization.int8 import quantize_rows
from secateur.registry import did_you_mean
from secateur.runtime.formats import VALUES, Layout, formats
from secateur.runtime.formats.kept import kept_mask

__all__ = [
    "AUTO",
    "DENSE",
    "KEEP",
    "LayoutChoice",
    "check_names",
    "choose_layout",
    "squared_loss",
    "values_for",
    "without_negative_zeros",
]

AUTO = "auto"
DENSE = "dense"
"""The format that holds any matrix, taken where no other is smaller."""
KEEP = "keep"
"""Values in the dtype of the source, so that no number changes."""
AT_ONCE = 2**22
"""Weights whose rounding is measured at the same time."""
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


def check_names(format: str, values: str) -> None:
    """Refuse unknown names of formats or values.

    Raises:
        RecipeError: names the available ones.
    """
    known = {"format": (format, [AUTO, *formats]), "values": (values, [AUTO, KEEP, *VALUES])}
    for kind, (name, names) in known.items():
        if name not in names:
            raise RecipeError(f"unknown {kind} {name!r}", remedy=did_you_mean(name, names))


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


def squared_loss(weight: Tensor, values: str) -> tuple[float, float]:
    """The error of storing a matrix in other values, ‖W − Ŵ‖², and ‖W‖².

    Args:
        weight: W [out, in], as the source holds it.
        values: a name in `VALUES`; W rounded to it is Ŵ.

    Example:
        >>> import torch
        >>> from secateur.runtime.choice import squared_loss
        >>> squared_loss(torch.tensor([[1.0, 1 + 2**-9]]), "bfloat16")  # the second becomes 1
        (3.814697265625e-06, 2.0039100646972656)
    """
    lost = norm = 0.0
    for exact in weight.split(max(1, AT_ONCE // weight.shape[1])):
        if values == "int8":
            codes, scale = quantize_rows(exact)
            rounded = codes * scale[:, None]
        else:
            rounded = exact.to(VALUES[values]).float()
        lost += float((exact.float() - rounded).double().square().sum())
        norm += float(exact.double().square().sum())
    return lost, norm


def without_negative_zeros(weight: Tensor) -> Tensor:
    """The same weights with every zero stored as +0.0; products with either zero are the same.

    Pruning by multiplication with a mask leaves −0.0 where weights were negative, and a format
    keeps every value except +0.0.
    """
    return weight.masked_fill(weight == 0, 0.0)


def choose_layout(
    weight: Tensor, *, format: str, values: str, transposed: bool = False
) -> LayoutChoice:
    """The smallest layout for a matrix among the allowed ones; dense is always allowed.

    Args:
        weight: [out, in], as in the source.
        format: `auto`, or a name in `formats`: that format or dense.
        values: a name in `VALUES`.
        transposed: whether the source stores [in, out].
    """
    stored = weight.contiguous() if values == "int8" else weight.to(VALUES[values]).contiguous()
    nonzero = stored != 0
    nonzeros = int(torch.count_nonzero(nonzero))
    negative_zeros = int(torch.count_nonzero(kept_mask(stored))) - nonzeros
    layouts = formats[DENSE].candidates(nonzero, values, transposed)
    offered = [
        layout
        for name in formats
        if name != DENSE and (name == format or (format == AUTO and formats[name].automatic))
        for layout in formats[name].candidates(nonzero, values, transposed)
    ]
    layouts += offered
    sizes = [formats[layout.format].nbytes(layout, nonzeros) for layout in layouts]
    best = min(range(len(layouts)), key=sizes.__getitem__)
    return LayoutChoice(layouts[best], nonzeros, negative_zeros, sizes[best], bool(offered))
