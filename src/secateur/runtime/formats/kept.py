"""Shared by the formats: which weights are kept, their values, and the checks of both."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from secateur.errors import CheckpointError, NumericalError
from secateur.quantization.int8 import LARGEST, dequantize_rows, quantize_rows
from secateur.runtime.formats import Layout, PartSpec, check_specs
from secateur.types import Mask, Weight

__all__ = ["as_stored", "check_values", "expand", "kept_mask", "scale_spec", "select"]

BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64, 1: torch.int8}


def kept_mask(weight: Weight) -> Mask:
    """Which weights are stored: those with a bit of 1, so all except +0.0."""
    return weight.view(BITS[weight.dtype.itemsize]) != 0


def as_stored(weight: Weight, layout: Layout) -> tuple[Mask, Tensor, dict[str, Tensor]]:
    """Convert a matrix to the values of a layout.

    Returns:
        Which weights are kept [out, in]; the matrix [out, in] in the stored dtype; and the
        scales as a part, for int8. A kept weight can round to the integer 0 and stays kept.

    Raises:
        NumericalError: a weight would become infinite, or is not finite and must become int8.
    """
    weight = weight.cpu().contiguous()  # parts go to files
    if layout.values == "int8":
        quantized, scale = quantize_rows(weight)
        return kept_mask(weight), quantized, {"weight_scale": scale}
    stored = weight.to(layout.dtype)
    if stored.dtype != weight.dtype:
        lost = torch.isinf(stored) & torch.isfinite(weight)
        if lost.any():
            raise NumericalError(
                f"{int(lost.sum())} of {weight.numel()} weights are too large for {layout.values}",
                remedy="store them as bfloat16 or float32",
            )
    return kept_mask(stored), stored, {}


def select(stored: Tensor, mask: Mask) -> Tensor:
    """The kept values [nnz] of a matrix, in row-major order.

    It uses numpy, whose selection by a mask needs no index of eight bytes per value.
    """
    bits = BITS[stored.dtype.itemsize]
    return torch.from_numpy(stored.view(bits).numpy()[mask.numpy()]).view(stored.dtype)


def expand(mask: Mask, values: Tensor, scale: Tensor | None) -> Weight:
    """The matrix [out, in] of kept values; dequantized to float32 when there are scales."""
    bits = BITS[values.dtype.itemsize]  # copied as bits, so that every NaN keeps its bits
    dense = torch.zeros(mask.shape, dtype=bits)
    dense.numpy()[mask.numpy()] = values.view(bits).numpy()
    if scale is not None:
        return dequantize_rows(dense, scale)
    return dense.view(values.dtype)


def scale_spec(layout: Layout) -> dict[str, PartSpec]:
    """The part that int8 values add: a scale for each row."""
    if layout.values != "int8":
        return {}
    return {"weight_scale": PartSpec(torch.float32, (layout.shape[0],))}


def check_values(parts: Mapping[str, Tensor], layout: Layout, values: str) -> None:
    """Refuse parts of wrong dtypes or shapes, −128, and scales that are not finite and positive.

    Args:
        parts: by suffix.
        layout: of the matrix.
        values: the suffix of the part with the values.

    Raises:
        CheckpointError: what does not fit.
    """
    found = {suffix: PartSpec(part.dtype, tuple(part.shape)) for suffix, part in parts.items()}
    check_specs(found, layout)
    if layout.values != "int8":
        return
    below = int((parts[values] < -LARGEST).sum())
    if below:
        raise CheckpointError(f"{below} int8 values are -128, which is not on the grid")
    scale = parts["weight_scale"]
    odd = int((~(torch.isfinite(scale) & (scale > 0))).sum())
    if odd:
        raise CheckpointError(f"{odd} of {scale.numel()} scales are not finite and positive")
