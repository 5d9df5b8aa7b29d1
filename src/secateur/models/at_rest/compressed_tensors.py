"""Folders of compressed-tensors, as llm-compressor and SparseML write and wrote them.

The reader is our own, since each release of the library reads what that release writes. The names
of the parts say how a matrix is stored, so mixtures of formats need no case of their own.

**Matrices without their zeros: the formats sparse-bitmask and sparse-24-bitmask.**

compressed   the values that are kept, row after row
bitmask      uint8 [rows, ⌈columns / 8⌉]; bit i of byte j is column 8 j + i
shape        of the dense tensor
row_offsets  sparse-bitmask only: the index of the first value of each row

**Integers and float8 with scales: pack-, int-, float-, naive- and mxfp8-quantized.**

weight             int8 or float8 [out, in]                                  or
weight_packed      int32 [out, ⌈in / F⌉], F = ⌊32 / bits⌋ integers in each word, the lowest first,
                   plus 2^(bits − 1); later releases leave no bits unused: [out, ⌈in · bits / 32⌉].
                   weight_shape has the two sizes
weight_scale       one; [out] or [out, 1]; [out or 1, groups of columns]; [blocks of rows, of
                   columns]; of mxfp8 bytes e for 2^(e − 127)
weight_zero_point  in the shape of the scale, or packed along its rows; none: 0
weight_g_idx       [in], the group of each column; none, or −1: in order

W = (q − zero_point) · scale

**4-bit floating point: nvfp4- and mxfp4-pack-quantized.**

weight_packed        uint8 [out, in / 2], two codes in a byte, the first in its low four bits
weight_scale         float8 [out, in / 16], or bytes e for 2^(e − 127), [out, in / 32]
weight_global_scale  float32, one number; none: 1

W = E2M1[code] · weight_scale / weight_global_scale

`modelopt.py` has the names of NVIDIA's Model-Optimizer for the same two forms.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from math import prod
from typing import ClassVar

import torch
from torch import Tensor

from secateur.errors import ArchitectureError, CheckpointError
from secateur.models import at_rest
from secateur.models.checkpoint import CheckpointReader, TensorEntry
from secateur.models.configuration import DESCRIPTIONS

OF_ACTIVATIONS = (
    "input_scale", "input_zero_point", "input_g_idx", "input_global_scale", "output_scale",
    "output_zero_point",
    "k_scale", "v_scale", "k_zero_point", "v_zero_point", "q_scale", "q_zero_point",
)  # fmt: skip
MARLIN = "scale_packed"
"""A part that marlin-24 alone has, which is in the order of one GPU kernel."""
BITMASK_PARTS = ("compressed", "bitmask", "shape", "row_offsets")
SCALED_PARTS = (
    "weight",
    "weight_packed",
    "weight_shape",
    "weight_scale",
    "weight_zero_point",
    "weight_g_idx",
    "weight_global_scale",
    "weight_scale_2",
)
STORED = {torch.int8: "int8", torch.float8_e4m3fn: "float8"}
"""The dtypes of weights that have a scale, and their usual words."""
GROUPS = {torch.float8_e4m3fn: (16, 32), torch.uint8: (32,)}
"""How many 4-bit floats of a row may share a scale, by its dtype."""


class CompressedTensorsFolder(at_rest.NamedForm):
    """The formats of compressed-tensors, but for marlin-24 and floats of 6 bits."""

    name: ClassVar[str] = "compressed-tensors"
    aliases: ClassVar[tuple[str, ...]] = ("sparseml",)
    keys: ClassVar[tuple[str, ...]] = DESCRIPTIONS[1:]
    of_activations: ClassVar[tuple[str, ...]] = OF_ACTIVATIONS

    def assemblies(
        self, source: at_rest.SourceFolder, described: at_rest.Described
    ) -> dict[str, at_rest.Assembly]:
        """Refuses rotated weights, and marlin-24."""
        stored = source.reader.entries
        _refuse_unknown(described, stored)
        weights = (group.get("weights") for group in _groups_of(described))
        named = [x.get("num_bits") for x in weights if isinstance(x, Mapping)]
        widths = frozenset(bits for bits in named if type(bits) is int and 1 <= bits <= 8)
        made: dict[str, at_rest.Assembly] = {}
        for name, parts in _grouped(stored).items():
            try:
                sparse = {role: x for role, x in parts.items() if role in BITMASK_PARTS}
                scaled = {role: x for role, x in parts.items() if role in SCALED_PARTS}
                if sparse and "weight" in parts:
                    raise at_rest.damaged("the weight is stored, and so is its bitmask", name)
                made[name] = (
                    _scaled_assembly(source.reader, scaled, sparse, source.dtype, widths)
                    if scaled
                    else _sparse_assembly(source.reader, sparse)
                )
            except CheckpointError as error:
                raise CheckpointError(error.what, where=name, remedy=error.remedy) from None
        return made

    def notes(self, described: at_rest.Described) -> tuple[str, ...]:
        """Whether the source rounds activations, or its cache of keys and values."""
        said = "the source also rounds activations; the result does not"
        rounds = bool(described.get("kv_cache_scheme")) or any(
            group.get("input_activations") or group.get("output_activations")
            for group in _groups_of(described)
        )
        return (said,) if rounds else ()


def _refuse_unknown(described: at_rest.Described, stored: Iterable[str]) -> None:
    """Refuse what a plain model cannot express, and formats that are not read."""
    remedy = "name the model before this step, or decompress it with the tool that made it"
    if described.get("transform_config"):
        raise ArchitectureError(
            "the model rotates its activations while it runs (transform_config)", remedy=remedy
        )
    for name in stored:
        if name.endswith(f".{MARLIN}"):
            raise ArchitectureError("marlin-24 is not read", where=name, remedy=remedy)


def _groups_of(described: at_rest.Described) -> Iterator[at_rest.Described]:
    """The groups of matrices that a configuration describes."""
    groups = described.get("config_groups")
    every = groups.values() if isinstance(groups, Mapping) else ()
    return (group for group in every if isinstance(group, Mapping))


def _grouped(stored: Iterable[str]) -> dict[str, dict[str, str]]:
    """The stored names of the parts of each dense tensor.

    Parts stand beside each other: `layer.weight_scale`, `layer.bitmask`. Early files have them
    below the name of the tensor: `layer.weight.bitmask`, also for vectors.
    """
    roles = {*BITMASK_PARTS, *SCALED_PARTS} - {"weight"}
    found: dict[str, dict[str, str]] = {}
    for name in stored:
        owner, _, role = name.rpartition(".")
        if role in roles:
            dense = owner if owner.endswith((".weight", ".bias")) else f"{owner}.weight"
            found.setdefault(dense, {})[role] = name
    for dense in found.keys() & set(stored):
        found[dense]["weight"] = dense
    return found


def _sparse_assembly(reader: CheckpointReader, parts: Mapping[str, str]) -> at_rest.Assembly:
    """The tensor that these parts make."""
    missing = {"compressed", "bitmask", "shape"} - parts.keys()
    if missing:
        raise at_rest.damaged(f"there is no {min(missing)} beside them", next(iter(parts.values())))
    place, entries = parts["bitmask"], {role: reader.entries[name] for role, name in parts.items()}
    if entries["shape"].dtype.is_floating_point or prod(entries["shape"].shape) not in (1, 2):
        raise at_rest.damaged(
            "the shape of the tensor is not one or two whole numbers", parts["shape"]
        )
    shape = tuple(int(x) for x in reader.read(parts["shape"]).flatten())
    if min(shape) < 1 or entries["bitmask"].dtype != torch.uint8:
        raise at_rest.damaged(
            f"a bitmask of {entries['bitmask'].dtype} for the shape {list(shape)}", place
        )
    packed = (*shape[:-1], -(-shape[-1] // 8))
    if entries["bitmask"].shape != packed:
        raise at_rest.damaged(
            f"the bitmask is {list(entries['bitmask'].shape)}, the shape {list(shape)} needs "
            f"{list(packed)}",
            place,
        )
    stored_as = "sparse-bitmask" if "row_offsets" in parts else "sparse-24-bitmask"
    return at_rest.Assembly(
        parts, shape, entries["compressed"].dtype, stored_as, lambda p: _unmasked(p, shape)
    )


def _unmasked(parts: at_rest.Parts, shape: tuple[int, ...]) -> Tensor:
    """The dense tensor."""
    bits = at_rest.unpacked(parts["bitmask"], 1).bool().flatten(-2)
    kept = bits[..., : shape[-1]]  # the last byte of a row may have more bits than columns
    values = parts["compressed"].flatten()
    if bits[..., shape[-1] :].any():
        raise at_rest.damaged("the bitmask keeps weights beyond the last column", "bitmask")
    counts = kept.sum(-1, dtype=torch.int64).flatten()
    if int(counts.sum()) != values.numel():
        raise at_rest.damaged(
            f"the bitmask keeps {int(counts.sum())} weights, {values.numel()} are stored", "bitmask"
        )
    if "row_offsets" in parts:
        starts = counts.cumsum(0) - counts
        if not torch.equal(parts["row_offsets"].flatten().to(torch.int64), starts):
            raise at_rest.damaged(
                "the offsets of the rows are not those of the bitmask", "row_offsets"
            )
    raw = torch.uint8 if values.itemsize == 1 else values.dtype  # float8 has no scatter
    dense = torch.zeros(shape, dtype=raw)
    dense[kept] = values.view(raw)
    return dense.view(values.dtype)


def _scaled_assembly(
    reader: CheckpointReader,
    parts: Mapping[str, str],
    sparse: Mapping[str, str],
    dtype: torch.dtype,
    widths: frozenset[int],
) -> at_rest.Assembly:
    """The matrix that these parts make."""
    if "weight_scale" not in parts:
        raise at_rest.damaged("there is no weight_scale beside it", next(iter(parts.values())))
    for role in ("weight_scale", "weight_zero_point"):
        if role in parts and len(reader.entries[parts[role]].shape) > 2:
            raise at_rest.damaged(f"{role} has more than two dimensions", parts[role])
    codes = parts.get("weight_packed", parts.get("weight"))
    if codes is not None and reader.entries[codes].dtype == torch.uint8:
        packed = reader.entries[codes].shape
        check_groups(packed, reader.entries[parts["weight_scale"]], codes)
        return at_rest.Assembly(parts, (packed[0], 2 * packed[1]), dtype, "float4", multiplied)
    if "weight_packed" in parts:
        shape, bits = _packed_shape(reader, parts, widths)
        make, stored_as = partial(_from_words, bits=bits, shape=shape), f"pack-quantized int{bits}"
        return at_rest.Assembly(parts, shape, dtype, stored_as, make)
    if sparse:
        inner = _sparse_assembly(reader, sparse)
        _check_dtype(inner.dtype, sparse["compressed"])
        return at_rest.Assembly(
            {**sparse, **parts},
            inner.shape,
            dtype,
            f"{inner.stored_as} {STORED[inner.dtype]}",
            lambda p: _scaled(inner.make({role: p[role] for role in sparse}), p),
        )
    if "weight" not in parts:
        raise at_rest.damaged("there are scales without a weight", parts["weight_scale"])
    entry = reader.entries[parts["weight"]]
    _check_dtype(entry.dtype, parts["weight"])
    if len(entry.shape) != 2:
        raise at_rest.damaged(f"a weight of shape {list(entry.shape)} has a scale", parts["weight"])
    return at_rest.Assembly(parts, entry.shape, dtype, STORED[entry.dtype], multiplied)


def check_groups(packed: tuple[int, ...], scale: TensorEntry, where: str) -> None:
    """Refuse 4-bit floats [out, in / 2] whose scales are not those of a group of columns each."""
    sizes = GROUPS.get(scale.dtype, ())
    expected = [[*packed[:-1], 2 * packed[-1] // size] for size in sizes if len(packed) == 2]
    if list(scale.shape) not in expected:
        raise at_rest.damaged(
            f"{list(packed)} bytes of 4-bit numbers with scales {list(scale.shape)} of "
            f"{scale.dtype}: NVFP4 has one in float8 for 16 numbers of a row, MXFP4 a byte for 32",
            where,
        )


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
        raise at_rest.damaged("there is no weight_shape beside it", place)
    sizes = reader.entries[parts["weight_shape"]]
    if sizes.dtype.is_floating_point or torch.Size(sizes.shape).numel() != 2:
        raise at_rest.damaged(
            "the shape of the matrix is not two whole numbers", parts["weight_shape"]
        )
    rows, columns = (int(x) for x in reader.read(parts["weight_shape"]).flatten())
    if entry.dtype != torch.int32 or min(rows, columns) < 1:
        raise at_rest.damaged(f"packed integers of {entry.dtype} for [{rows}, {columns}]", place)
    fits = [
        bits
        for bits in widths
        if entry.shape in ((rows, -(-columns // (32 // bits))), (rows, -(-columns * bits // 32)))
    ]
    if len(fits) != 1:
        raise at_rest.damaged(
            f"{list(entry.shape)} words do not hold [{rows}, {columns}] integers of "
            f"{' or '.join(map(str, sorted(widths))) or 'no'} bits, as config.json says",
            place,
        )
    return (rows, columns), fits[0]


def _from_words(parts: at_rest.Parts, bits: int, shape: tuple[int, int]) -> Tensor:
    """The matrix of packed integers, float64."""
    zero, words = parts.get("weight_zero_point"), parts["weight_packed"]
    # an integer may begin in one word and end in the next
    crossing = words.shape[1] != -(-shape[1] // (32 // bits))
    # packed along the rows: [⌈out / F⌉, groups]
    if zero is not None and zero.dtype == torch.int32 and zero.ndim == 2:
        zero = _unpacked_rows(zero.t(), bits, shape[0], crossing=crossing).t()
        parts = {**parts, "weight_zero_point": zero}
    return _scaled(_unpacked_rows(words, bits, shape[1], crossing=crossing), parts)


def _unpacked_rows(words: Tensor, bits: int, count: int, *, crossing: bool) -> Tensor:
    """The first integers, so many, of each row of words."""
    if crossing:
        alone = words.clone(memory_format=torch.contiguous_format)  # only such a one has bytes
        single = at_rest.unpacked(alone.view(torch.uint8), 1).flatten(-2)
        if single.shape[1] < count * bits:
            raise at_rest.damaged(f"{list(words.shape)} words hold too few integers", "words")
        apart = single[:, : count * bits].unflatten(-1, (-1, bits)).to(torch.int32)
        unsigned = (apart << torch.arange(bits, dtype=torch.int32)).sum(-1, dtype=torch.int32)
    else:
        unsigned = at_rest.unpacked(words, bits).flatten(-2)[:, :count]
    return unsigned - 2 ** (bits - 1)


def multiplied(parts: at_rest.Parts) -> Tensor:
    """The matrix of weights, or of two 4-bit numbers in a byte, times their scales, float64."""
    stored = parts["weight_packed"] if "weight_packed" in parts else parts["weight"]
    return _scaled(at_rest.float4(stored) if stored.dtype == torch.uint8 else stored, parts)


def _scaled(stored: Tensor, parts: at_rest.Parts) -> Tensor:
    """(q − zero_point) · scale, float64."""
    scale, one = parts["weight_scale"], torch.ones(1)
    wholes = [parts.get(role, one) for role in ("weight_global_scale", "weight_scale_2")]
    if scale.dtype == torch.uint8:  # of the formats whose names begin with mx
        scale = at_rest.powers_of_two(scale)
    if not all(x.is_floating_point() for x in (scale, *wholes)) or any(
        x.numel() != 1 for x in wholes
    ):
        said = ", ".join(f"{x.dtype} {list(x.shape)}" for x in wholes)
        raise at_rest.damaged(
            f"the scales are {scale.dtype}, those of the matrix {said}", "weight_scale"
        )
    divisor, factor = (x.to(torch.float64).reshape(()) for x in wholes)
    scale = scale.to(torch.float64) * factor / divisor
    if scale.ndim == 1 and scale.numel() == len(stored):
        scale = scale.unsqueeze(1)
    spread = partial(_spread_out, shape=tuple(stored.shape), order=parts.get("weight_g_idx"))
    value = stored.to(torch.float64)
    zero = parts.get("weight_zero_point")
    if zero is not None:
        if zero.numel() != scale.numel():
            what = f"zero points {list(zero.shape)} beside scales {list(scale.shape)}"
            raise at_rest.damaged(what, "weight_zero_point")
        value = value - spread(zero.to(torch.float64).reshape(scale.shape))
    return value * spread(scale)


def _spread_out(scale: Tensor, shape: tuple[int, ...], order: Tensor | None) -> Tensor:
    """Scales in a shape that multiplies a matrix."""
    rows, columns = shape
    if scale.numel() == 1:
        return scale.reshape(1, 1)
    if scale.ndim != 2 or 0 in scale.shape or rows % len(scale) or columns % scale.shape[1]:
        raise at_rest.damaged(
            f"scales {list(scale.shape)} do not divide {list(shape)}", "weight_scale"
        )
    groups = scale.shape[1]
    if order is not None and not (order == -1).any():
        if order.shape != (columns,) or int(order.min()) < 0 or int(order.max()) >= groups:
            raise at_rest.damaged(
                f"a column names a group that is not one of {groups}", "weight_g_idx"
            )
        scale = scale[:, order.to(torch.int64)]  # a scale for each column
    return at_rest.spread_blocks(scale, shape, (rows // len(scale), columns // scale.shape[1]))


at_rest.stored_forms.register(CompressedTensorsFolder.name)(CompressedTensorsFolder())
