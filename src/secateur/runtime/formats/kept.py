"""Shared by the formats: which weights are kept, their values, and the checks of both."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from secateur.errors import CheckpointError, NumericalError
from secateur.quantization.groups import HIGHEST, LOWEST, Scales
from secateur.quantization.int8 import LARGEST, dequantize_rows, quantize_rows
from secateur.runtime.formats import Layout, PartSpec, check_specs
from secateur.runtime.formats.bits import padding_bits, unpack_numbers
from secateur.types import Mask, Weight

BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64, 1: torch.int8}


def kept_mask(weight: Weight) -> Mask:
    """Which weights are stored: those with a bit of 1, so all except +0.0."""
    return weight.view(BITS[weight.dtype.itemsize]) != 0


def as_stored(weight: Weight, layout: Layout) -> tuple[Mask, Tensor, dict[str, Tensor]]:
    """Convert a matrix to the values of a layout.

    Returns:
        Which weights are kept [out, in]; the matrix [out, in] in the dtype of the layout; and the
        parts with the scales of integers. A kept weight can round to the integer 0 and stays kept.

    Raises:
        NumericalError: a weight would become infinite, or is not finite and must become an integer.
    """
    weight = weight.cpu().contiguous()  # parts go to files
    if layout.values == "int8":
        quantized, scale = quantize_rows(weight)
        return kept_mask(weight), quantized, {"weight_scale": scale}
    if layout.grid is not None:
        quantized, scales = layout.grid.quantize(weight)
        parts = {"weight_scale": scales.code, "weight_exponent": scales.exponent}
        return kept_mask(weight), quantized, parts
    stored = weight.to(layout.dtype)
    if stored.dtype != weight.dtype:
        # beyond the largest number of float16, a cast gives infinity
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


def decode_values(stored: Tensor, layout: Layout, count: int) -> Tensor:
    """The values [..., count] of a part in the dtype of the layout: undoes `encode_values`."""
    if layout.grid is None:
        return stored
    numbers = unpack_numbers(stored, layout.grid.bits, count).view(torch.int8)
    # two's complement of few bits → int8: flip the sign bit, then subtract it
    sign = 2 ** (layout.grid.bits - 1)
    return numbers.bitwise_xor_(sign).sub_(sign)


def expand(mask: Mask, values: Tensor, parts: Mapping[str, Tensor], layout: Layout) -> Weight:
    """The matrix [out, in] of kept values; dequantized to float32 when they are integers."""
    bits = BITS[values.dtype.itemsize]  # copied as bits, so that every NaN keeps its bits
    dense = torch.zeros(mask.shape, dtype=bits)
    dense.numpy()[mask.numpy()] = values.view(bits).numpy()
    return dequantized(dense.view(values.dtype), parts, layout)


def dequantized(stored: Tensor, parts: Mapping[str, Tensor], layout: Layout) -> Weight:
    """The matrix [out, in] of all values, float32 if they are integers."""
    if layout.grid is not None:
        scales = Scales(parts["weight_exponent"], parts["weight_scale"])
        return layout.grid.dequantize(stored, scales)
    return dequantize_rows(stored, parts["weight_scale"]) if layout.integers else stored


def scale_specs(layout: Layout) -> dict[str, PartSpec]:
    """The parts that integers add: a scale for each row, or for each group and an exponent."""
    out, columns = layout.shape
    if layout.grid is not None:
        return {
            "weight_scale": PartSpec(torch.uint8, (out, layout.grid.groups(columns))),
            "weight_exponent": PartSpec(torch.int8, (out,)),
        }
    return {"weight_scale": PartSpec(torch.float32, (out,))} if layout.integers else {}


def fewest_values(length: int, layout: Layout) -> int:
    """The smallest number of values in a part of this length."""
    if layout.grid is None or length == 0:
        return length
    # a stream of `length` bytes is not full with one byte less: more than 8 (length − 1) bits
    return 8 * (length - 1) // layout.grid.bits + 1


def check_parts(parts: Mapping[str, Tensor], layout: Layout) -> None:
    """Refuse parts of wrong dtypes or shapes, and scales that are not finite and positive.

    Args:
        parts: by suffix.
        layout: of the matrix.

    Raises:
        CheckpointError: what does not fit.
    """
    found = {suffix: PartSpec(part.dtype, tuple(part.shape)) for suffix, part in parts.items()}
    check_specs(found, layout)
    if layout.grid is not None:
        exponent = parts["weight_exponent"]
        if odd := int(((exponent < LOWEST) | (exponent > HIGHEST)).sum()):
            raise CheckpointError(
                f"{odd} of {exponent.numel()} exponents are outside {LOWEST} to {HIGHEST}"
            )
    elif layout.integers:
        scale = parts["weight_scale"]
        if odd := int((~(torch.isfinite(scale) & (scale > 0))).sum()):
            raise CheckpointError(f"{odd} of {scale.numel()} scales are not finite and positive")


def check_values(stored: Tensor, layout: Layout, count: int) -> None:
    """Refuse integers beyond the grid, and bits past the last value of a bit stream.

    Args:
        stored: the part with the values, of the shape that `value_spec` gives.
        layout: of the matrix.
        count: the values of a row of that part.

    Raises:
        CheckpointError: what does not fit.
    """
    if not layout.integers:
        return
    if layout.grid is not None:  # every integer of a bit stream is on the grid
        rows = stored if stored.ndim == 2 else stored[None]
        if beyond := padding_bits(rows, count * layout.grid.bits):
            raise CheckpointError(f"{beyond} bits are set past the last value of a bit stream")
    elif below := int((stored < -LARGEST).sum()):
        raise CheckpointError(f"{below} int8 values are {-LARGEST - 1}, which is not on the grid")
