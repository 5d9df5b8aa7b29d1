"""Integers and float8 with scales: pack-quantized, int-quantized, float-quantized, naive-quantized.

weight             int8 or float8 [out, in]                                  or
weight_packed      int32 [out, ⌈in / F⌉], F = ⌊32 / bits⌋ integers in each word, the lowest first,
                   plus 2^(bits − 1); weight_shape has the two sizes
weight_scale       one; [out, 1]; [out or 1, groups of columns]; [blocks of rows, of columns]
weight_zero_point  in the shape of the scale, or packed along its rows; none: 0
weight_g_idx       [in], the group of each column; none, or −1: in order

W = (q − zero_point) · scale
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor

from secateur.errors import CheckpointError
from secateur.models.at_rest import Assembly, Parts, damaged
from secateur.models.at_rest.compressed_tensors.bitmask import sparse_assembly
from secateur.models.checkpoint import CheckpointReader

PARTS = (
    "weight",
    "weight_packed",
    "weight_shape",
    "weight_scale",
    "weight_zero_point",
    "weight_g_idx",
)
STORED = (torch.int8, torch.float8_e4m3fn)
"""The dtypes of weights that have a scale."""


def quantized_assembly(
    reader: CheckpointReader,
    parts: Mapping[str, str],
    sparse: Mapping[str, str],
    dtype: torch.dtype,
    widths: frozenset[int],
) -> Assembly:
    """The matrix that these parts make.

    Args:
        reader: the stored tensors; only the shape is read now.
        parts: the names of `PARTS`.
        sparse: the names of `bitmask.PARTS`, if the integers are stored without zeros.
        dtype: of the model.
        widths: the bits of integers that the configuration names.

    Raises:
        CheckpointError: a part is missing, or has an impossible shape or dtype.
    """
    if "weight_scale" not in parts:
        raise damaged("there is no weight_scale beside it", next(iter(parts.values())))
    for role in ("weight_scale", "weight_zero_point"):
        if role in parts and len(reader.entries[parts[role]].shape) > 2:
            raise damaged(f"{role} has more than two dimensions", parts[role])
    if "weight_packed" in parts:
        shape, bits = _packed_shape(reader, parts, widths)
        make, stored_as = partial(_from_words, bits=bits, shape=shape), f"pack-quantized int{bits}"
        return Assembly(parts, shape, dtype, stored_as, make)
    if sparse:
        inner = sparse_assembly(reader, sparse)
        _check_dtype(inner.dtype, sparse["compressed"])
        return Assembly(
            {**sparse, **parts},
            inner.shape,
            dtype,
            f"{inner.stored_as} {_dtype_word(inner.dtype)}",
            lambda p: _scaled(inner.make({role: p[role] for role in sparse}), p),
        )
    if "weight" not in parts:
        raise damaged("there are scales without a weight", parts["weight_scale"])
    entry = reader.entries[parts["weight"]]
    _check_dtype(entry.dtype, parts["weight"])
    if len(entry.shape) != 2:
        raise damaged(f"a weight of shape {list(entry.shape)} has a scale", parts["weight"])
    kind = _dtype_word(entry.dtype)
    return Assembly(parts, entry.shape, dtype, kind, lambda p: _scaled(p["weight"], p))


def _dtype_word(dtype: torch.dtype) -> str:
    """The usual word for a stored dtype."""
    return "int8" if dtype == torch.int8 else "float8"


def _check_dtype(dtype: torch.dtype, where: str) -> None:
    """Refuse a weight that has a scale and is no integer or float8."""
    if dtype not in STORED:
        raise CheckpointError(
            f"a weight of {dtype} has a scale; it would be rounded while the model runs",
            where=where,
            remedy="save the model in a compressed format (int-quantized, pack-quantized, "
            "float-quantized), or without its quantization",
        )


def _packed_shape(
    reader: CheckpointReader, parts: Mapping[str, str], widths: frozenset[int]
) -> tuple[tuple[int, int], int]:
    """The shape of a matrix of packed integers, and their bits."""
    place, entry = parts["weight_packed"], reader.entries[parts["weight_packed"]]
    if "weight_shape" not in parts:
        raise damaged("there is no weight_shape beside it", place)
    told = reader.entries[parts["weight_shape"]]
    if told.dtype.is_floating_point or torch.Size(told.shape).numel() != 2:
        raise damaged("the shape of the matrix is not two whole numbers", parts["weight_shape"])
    rows, columns = (int(x) for x in reader.read(parts["weight_shape"]).flatten())
    if entry.dtype != torch.int32 or min(rows, columns) < 1:
        raise damaged(f"packed integers of {entry.dtype} for [{rows}, {columns}]", place)
    fits = [bits for bits in widths if entry.shape == (rows, -(-columns // (32 // bits)))]
    if len(fits) != 1:
        raise damaged(
            f"{list(entry.shape)} words do not hold [{rows}, {columns}] integers of "
            f"{' or '.join(map(str, sorted(widths))) or 'no'} bits, as config.json says",
            place,
        )
    return (rows, columns), fits[0]


def _from_words(parts: Parts, bits: int, shape: tuple[int, int]) -> Tensor:
    """The matrix of packed integers, float64."""
    integers = words(parts["weight_packed"], bits)
    zero = parts.get("weight_zero_point")
    if zero is not None and zero.dtype == torch.int32 and zero.ndim == 2:
        zero = words(zero.t(), bits)[:, : shape[0]].t() - 2 ** (bits - 1)
        parts = {**parts, "weight_zero_point": zero}
    return _scaled(integers[:, : shape[1]] - 2 ** (bits - 1), parts)


def words(packed: Tensor, bits: int) -> Tensor:
    """The unsigned integers of int32 words along the last axis; leftover bits are skipped.

    Example:
        >>> import torch
        >>> from secateur.models.at_rest.compressed_tensors.quantized import words
        >>> words(torch.tensor([[0x21]], dtype=torch.int32), 4)[0, :3].tolist()
        [1, 2, 0]
    """
    shifts = torch.arange(32 // bits, dtype=torch.int32) * bits
    return ((packed.unsqueeze(-1) >> shifts) & (2**bits - 1)).flatten(-2)


def _scaled(stored: Tensor, parts: Parts) -> Tensor:
    """(q − zero_point) · scale, float64."""
    scale = parts["weight_scale"]
    if not scale.dtype.is_floating_point:
        raise damaged(f"the scales are {scale.dtype}", "weight_scale")
    spread = partial(_spread_out, shape=tuple(stored.shape), order=parts.get("weight_g_idx"))
    value = stored.to(torch.float64)
    zero = parts.get("weight_zero_point")
    if zero is not None:
        if zero.numel() != scale.numel():
            what = f"zero points {list(zero.shape)} beside scales {list(scale.shape)}"
            raise damaged(what, "weight_zero_point")
        value = value - spread(zero.to(torch.float64).reshape(scale.shape))
    return value * spread(scale.to(torch.float64))


def _spread_out(scale: Tensor, shape: tuple[int, ...], order: Tensor | None) -> Tensor:
    """Scales in a shape that multiplies a matrix."""
    rows, columns = shape
    if scale.numel() == 1:
        return scale.reshape(1, 1)
    if scale.ndim != 2 or rows % scale.shape[0] or columns % scale.shape[1]:
        raise damaged(f"scales {list(scale.shape)} do not divide {list(shape)}", "weight_scale")
    groups = scale.shape[1]
    if order is not None and not (order == -1).any():
        if order.shape != (columns,) or int(order.min()) < 0 or int(order.max()) >= groups:
            raise damaged(f"a column names a group that is not one of {groups}", "weight_g_idx")
        scale = scale[:, order.to(torch.int64)]
    else:
        scale = scale.repeat_interleave(columns // groups, 1)
    return scale.repeat_interleave(rows // scale.shape[0], 0)
