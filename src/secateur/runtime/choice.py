"""Which layout is smallest for a matrix: bitmask, N:M, or dense where packing does not pay."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from secateur.errors import CheckpointError, RecipeError
from secateur.quantization.int8 import quantize_rows
from secateur.registry import did_you_mean
from secateur.runtime.formats import VALUES, Layout, formats
from secateur.runtime.formats.kept import kept_mask
from secateur.types import Mask

__all__ = [
    "AUTO",
    "KEEP",
    "LayoutChoice",
    "check_wishes",
    "choose_layout",
    "squared_loss",
    "values_for",
    "without_negative_zeros",
]

AUTO = "auto"
KEEP = "keep"
"""Values in the dtype of the source, so that no number changes."""
AT_ONCE = 2**22
"""Weights whose rounding is measured at the same time."""
GROUPS = (2, 4, 8, 16, 32)
"""The M that are tried; for each of them N follows from the fullest group."""

WITHOUT_LOSS = {
    torch.float32: "float32",
    torch.bfloat16: "bfloat16",
    torch.float16: "float16",
    torch.float64: "float32",
}
"""What `keep` stores weights as: as they are, but for float64, which no runtime computes in."""


@dataclass(frozen=True)
class LayoutChoice:
    """How one matrix will be stored.

    Attributes:
        layout: its layout.
        nonzeros: weights that are not zero.
        negative_zeros: zeros that are written −0.0.
        nbytes: what its parts will take.
    """

    layout: Layout
    nonzeros: int
    negative_zeros: int
    nbytes: int


def check_wishes(format: str, values: str) -> None:
    """Refuse names that are no format or no values.

    Raises:
        RecipeError: with what there is.
    """
    known = {"format": (format, [AUTO, *formats]), "values": (values, [AUTO, KEEP, *VALUES])}
    for kind, (name, names) in known.items():
        if name not in names:
            raise RecipeError(f"unknown {kind} {name!r}", remedy=did_you_mean(name, names))


def values_for(dtype: torch.dtype, wanted: str, name: str) -> str:
    """What the weights of a matrix are stored as.

    Raises:
        CheckpointError: the dtype is none of a plain checkpoint.
    """
    if dtype not in WITHOUT_LOSS:
        raise CheckpointError(
            f"weights of {dtype} cannot be packed",
            where=name,
            remedy="name the checkpoint in float32, bfloat16 or float16, before quantization",
        )
    return WITHOUT_LOSS[dtype] if wanted == KEEP else wanted


def squared_loss(weight: Tensor, values: str) -> tuple[float, float]:
    """What storing a matrix in other values costs: ‖W − Ŵ‖² and ‖W‖².

    Args:
        weight: W [out, in], as the source holds it.
        values: a name in `VALUES`, which W is rounded to: Ŵ.

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
    """The same weights, every zero written +0.0; products with either are the same.

    Pruning by multiplication with a mask leaves −0.0 where weights were negative, and a format
    keeps whatever is not +0.0.
    """
    return weight.masked_fill(weight == 0, 0.0)


def choose_layout(
    weight: Tensor, *, format: str, values: str, transposed: bool = False
) -> LayoutChoice:
    """The smallest layout for a matrix among those wanted; dense is always one of them.

    Args:
        weight: [out, in], as the source holds it.
        format: `auto`, or a name in `formats`: that format or dense.
        values: a name in `VALUES`.
        transposed: whether the source stores [in, out].
    """
    stored = weight.contiguous() if values == "int8" else weight.to(VALUES[values]).contiguous()
    nonzero = stored != 0
    nonzeros = int(torch.count_nonzero(nonzero))
    negative_zeros = int(torch.count_nonzero(kept_mask(stored))) - nonzeros
    out, columns = weight.shape
    layouts = [Layout("dense", values, (out, columns), transposed=transposed)]
    if format in (AUTO, "bitmask"):
        layouts.append(Layout("bitmask", values, (out, columns), transposed=transposed))
    if format in (AUTO, "n-of-m"):
        layouts += [
            Layout("n-of-m", values, (out, columns), pattern, transposed)
            for pattern in patterns_that_fit(nonzero)
        ]
    sizes = [formats[layout.format].nbytes(layout, nonzeros) for layout in layouts]
    best = min(range(len(layouts)), key=sizes.__getitem__)
    return LayoutChoice(layouts[best], nonzeros, negative_zeros, sizes[best])


def patterns_that_fit(nonzero: Mask) -> list[str]:
    """The patterns N:M that hold every weight that is not zero, N as small as it can be."""
    found = []
    counts = nonzero.contiguous().view(torch.uint8)
    for group in GROUPS:  # each of two groups of the one before
        if counts.shape[1] % 2:
            break
        counts = counts[:, 0::2] + counts[:, 1::2]
        kept = max(1, int(counts.max()))
        if kept < group:
            found.append(f"{kept}:{group}")
    return found
