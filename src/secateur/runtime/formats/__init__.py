"""Formats: how one matrix is stored without its zeros. One file each; see `docs/format.md`.

A format packs a matrix [out, in] into a few named tensors, its parts, and unpacks it bit for bit.
The bits decide what is kept: a weight is dropped when all of its bits are 0, so −0.0 and NaN are
kept like any other value.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from math import prod
from typing import Annotated, Any, ClassVar, Protocol

import torch
from pydantic import ConfigDict, Field, StrictBool, StrictInt
from torch import Tensor

from secateur.errors import CheckpointError
from secateur.quantization.blocks import TYPES, BlockGrid
from secateur.quantization.groups import GROUPS, GroupGrid
from secateur.registry import Registry
from secateur.runtime.formats.bits import pack_bits, pack_numbers, row_bytes
from secateur.types import FLOATS, Mask, Weight

__all__ = [
    "BITS",
    "BLOCKS",
    "GRID_BITS",
    "VALUES",
    "Format",
    "Layout",
    "PartSpec",
    "WeightFormat",
    "bitmask_parts",
    "check_specs",
    "encode_values",
    "fitting",
    "formats",
    "length_of",
    "part_suffixes",
    "stored_bytes",
    "value_spec",
    "why_no_pattern",
]

GRID_BITS: Mapping[str, int] = {"int4": 4, "int3": 3, "int2": 2}
"""The bits of values that are stored as a bit stream, on a grid with a scale for each group."""

BITS: Mapping[str, int] = {"int8": 8, **GRID_BITS}
"""The bits of values that are integers with scales."""

BLOCKS: tuple[str, ...] = tuple(TYPES)
"""Values that are stored in blocks of llama.cpp, by `quantization.blocks`."""

VALUES: Mapping[str, torch.dtype] = {**FLOATS, **dict.fromkeys(BITS, torch.int8)}
"""How kept weights can be stored, and the dtype in which `Format.kept` returns them."""

_NARROW: Mapping[str, str] = {
    "q2_k": "q4_0", "q3_k": "q4_0", "q4_k": "q5_0", "q5_k": "q5_1", "q6_k": "q8_0",
    "iq4_xs": "iq4_nl",
}  # fmt: skip
"""The types with blocks of 32 weights that llama.cpp takes where a row has no blocks of 256."""


def fitting(values: str, columns: int) -> str:
    """The values that llama.cpp stores where a row of so many weights cannot have these.

    Example:
        >>> from secateur.runtime.formats import fitting
        >>> fitting("q4_k", 512), fitting("q4_k", 576), fitting("q4_k", 24)
        ('q4_k', 'q5_0', 'float16')
    """
    if values not in TYPES or columns % TYPES[values].block == 0:
        return values
    return fitting(_NARROW[values], columns) if values in _NARROW else "float16"


Side = Annotated[StrictInt, Field(ge=1, le=2**31 - 1)]


@dataclass(frozen=True)
class PartSpec:
    """Dtype and shape of one stored tensor.

    Attributes:
        dtype: of its elements.
        shape: its sides.
        width: the bits of its numbers, if the bytes of a row are a bit stream; for archives only.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]
    width: int = field(default=8, compare=False)

    @property
    def nbytes(self) -> int:
        """Its size in bytes."""
        return prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class Layout:
    """How one matrix is stored.

    Args:
        format: a name in `formats`.
        values: a name in `VALUES`, the stored dtype of kept weights; or a name in `BLOCKS`.
        shape: (out, in) of the matrix.
        pattern: N:M, for formats that have one.
        transposed: whether the dense checkpoint stores the transpose [in, out] (GPT-2's Conv1D).
        group: the weights of a row that share a scale, for int4, int3 and int2.

    Raises:
        CheckpointError: a field has the wrong kind, or fields contradict each other.
    """

    format: str
    values: str
    shape: tuple[Side, Side]
    pattern: str | None = None
    transposed: StrictBool = False
    group: StrictInt | None = None

    __pydantic_config__ = ConfigDict(extra="forbid")

    def __post_init__(self) -> None:
        if self.format not in formats:
            raise _refused(self, f"there is no format {self.format!r}")
        if self.values not in (*VALUES, *BLOCKS):
            raise _refused(self, f"values cannot be {self.values!r}")
        if self.values in GRID_BITS:
            if self.group not in GROUPS:
                raise _refused(self, f"{self.values} needs a group of {GROUPS}, not {self.group!r}")
        elif self.group is not None:
            raise _refused(self, f"{self.values} has no groups")
        if self.blocks is not None and self.format != "dense":
            raise _refused(self, f"blocks of {self.values} store every weight")
        if fitting(self.values, self.shape[1]) != self.values:
            raise _refused(self, f"its rows are no whole blocks of {self.values}")
        why = formats[self.format].why_not(self)
        if why is not None:
            raise _refused(self, why)

    @property
    def kept_of_group(self) -> tuple[int, int]:
        """(N, M) of the pattern."""
        written = re.fullmatch(r"([1-9][0-9]?):([1-9][0-9]?)", str(self.pattern), re.ASCII)
        if written is None:
            raise _refused(self, "the pattern is not N:M")
        return int(written[1]), int(written[2])

    @property
    def weights(self) -> int:
        """The number of weights, zeros included."""
        return self.shape[0] * self.shape[1]

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of kept values: integers are int8, however many bits are stored."""
        return VALUES.get(self.values, torch.float32)

    @property
    def integers(self) -> bool:
        """Whether kept values are integers with scales, and not the weights themselves."""
        return self.values in BITS

    @property
    def blocks(self) -> BlockGrid | None:
        """The grid of blocks of llama.cpp; None for other values."""
        return BlockGrid(self.values) if self.values in BLOCKS else None

    @property
    def coded(self) -> bool:
        """Whether the weights are made from what is stored: from integers, or from blocks."""
        return self.values not in FLOATS

    @property
    def grid(self) -> GroupGrid | None:
        """The grid of the values; None unless they are int4, int3 or int2."""
        return None if self.group is None else GroupGrid(GRID_BITS[self.values], self.group)

    def to_json(self) -> dict[str, Any]:
        """The fields that are not defaults, for the metadata of a file."""
        shape, pattern, group = list(self.shape), self.pattern, self.group
        required = {"format": self.format, "values": self.values, "shape": shape}
        optional = {"pattern": pattern, "transposed": self.transposed or None, "group": group}
        return required | {key: value for key, value in optional.items() if value is not None}


@dataclass(frozen=True)
class WeightFormat:
    """How linears are stored.

    Attributes:
        values: such as bf16 or int4. Where models are timed, they are bf16, int8 or int4, and with
            integers the embedding and the head are int8.
        sparsity: the fraction of zeros, stored with a bitmask; 0 for dense matrices.
    """

    values: str
    sparsity: float

    @property
    def name(self) -> str:
        """For people."""
        return f"{self.sparsity:.0%} zeros, {self.values}" if self.sparsity else self.values

    @property
    def bits(self) -> float:
        """Bits of a weight of a timed model, without scales."""
        size = {"bf16": 16, "int8": 8, "int4": 4}[self.values]
        return size * (1 - self.sparsity) + (1 if self.sparsity else 0)


def _refused(layout: Layout, why: str) -> CheckpointError:
    """The error for an impossible layout."""
    fields = (layout.format, layout.values, layout.shape, layout.pattern, layout.group)
    described = ", ".join(map(repr, fields))
    return CheckpointError(
        f"no matrix can be stored like this ({described[:160]}): {why}",
        remedy="the file is damaged, or was made by a newer release of secateur",
    )


class Format(Protocol):
    """The contract of a format. The defaults suit a format without a pattern."""

    name: ClassVar[str]

    suffixes: ClassVar[tuple[str, ...]]
    """The suffixes that parts may have; a packed matrix has exactly those of its layout."""

    automatic: ClassVar[bool] = True
    """Whether `auto` tries it. A format with few readers should be chosen by name."""

    def candidates(self, nonzero: Mask, dense: Layout) -> list[Layout]:
        """The layouts in which a matrix can be stored; none if the format cannot hold it.

        Args:
            nonzero: the weights that are not zero, bool [out, in].
            dense: the matrix without a format that drops zeros: shape, values, group.
        """
        return [replace(dense, format=self.name)]

    def why_not(self, layout: Layout) -> str | None:
        """What is wrong with the pattern and shape of a layout of this format; None if nothing."""
        return why_no_pattern(layout)

    def nonzeros(self, found: Mapping[str, PartSpec], layout: Layout) -> int:
        """How many weights these parts keep, where the layout does not fix it; 0 where it does.

        Where several numbers need the same parts, the smallest of them.

        Args:
            found: dtypes and shapes as a file claims them, by suffix; some may be missing.
            layout: of the matrix.
        """
        return 0

    def parts(self, layout: Layout, nonzeros: int) -> dict[str, PartSpec]:
        """Dtype and shape of every part, by suffix.

        Args:
            layout: of the matrix.
            nonzeros: the number of kept weights, where the format does not fix it.
        """
        ...

    def pack(self, weight: Weight, layout: Layout) -> dict[str, Tensor]:
        """The parts of a matrix [out, in], cast to the values of the layout, by suffix.

        The matrix may be on any device. Parts are on the CPU, because they go to files.

        Raises:
            NumericalError: the stored dtype cannot represent a weight.
        """
        ...

    def kept(self, parts: Mapping[str, Tensor], layout: Layout) -> tuple[Mask, Tensor]:
        """The mask [out, in] and the kept values [nnz] in row-major order.

        Values have the dtype of the layout: those of int8, int4, int3 and int2 are integers, int8.
        """
        ...

    def unpack(self, parts: Mapping[str, Tensor], layout: Layout) -> Weight:
        """The matrix [out, in]: exactly what was packed; float32 for integers with scales."""
        ...

    def check(self, parts: Mapping[str, Tensor], layout: Layout) -> None:
        """Refuse parts that do not fit the layout or each other; what passes unpacks safely.

        Raises:
            CheckpointError: names what does not fit.
        """
        ...


formats: Registry[Format] = Registry("format", __name__)


def stored_bytes(layout: Layout, nonzeros: int) -> int:
    """The bytes of all parts of a matrix with so many kept weights."""
    return sum(spec.nbytes for spec in formats[layout.format].parts(layout, nonzeros).values())


def part_suffixes() -> list[str]:
    """Every suffix that a part of a packed matrix may have."""
    return sorted({suffix for name in formats for suffix in formats[name].suffixes})


def why_no_pattern(layout: Layout) -> str | None:
    """`Format.why_not` of formats that have no pattern."""
    return None if layout.pattern is None else f"the format {layout.format!r} has no pattern"


def value_spec(layout: Layout, *shape: int) -> PartSpec:
    """The part that holds values of this shape: for int4, int3, int2 each row is a bit stream."""
    if layout.grid is None:
        return PartSpec(layout.dtype, shape)
    bits = layout.grid.bits
    return PartSpec(torch.uint8, (*shape[:-1], row_bytes(shape[-1] * bits)), bits)


def encode_values(values: Tensor, layout: Layout) -> Tensor:
    """Values [..., n] of the dtype of the layout, as they are stored; see `value_spec`."""
    return values if layout.grid is None else pack_numbers(values, layout.grid.bits)


def length_of(spec: PartSpec | None) -> int:
    """The length of a part with one dimension; 0 of any other, or of none."""
    return spec.shape[0] if spec is not None and len(spec.shape) == 1 else 0


def check_specs(found: Mapping[str, PartSpec], layout: Layout) -> None:
    """Refuse parts whose names, dtypes or shapes do not match the layout.

    Reads only the header, so a file can be refused before its data is read.

    Raises:
        CheckpointError: names the part.
    """
    nonzeros = formats[layout.format].nonzeros(found, layout)
    if nonzeros > layout.weights:
        raise CheckpointError(f"{nonzeros} values for a matrix of {layout.weights} weights")
    expected = formats[layout.format].parts(layout, nonzeros)
    if set(found) != set(expected):
        raise CheckpointError(
            f"a matrix stored as {layout.format} with {layout.values} values has the parts "
            f"{', '.join(sorted(expected))}, not {', '.join(sorted(found)) or 'none'}"
        )
    for suffix, spec in expected.items():
        if found[suffix] != spec:
            raise CheckpointError(
                f"{suffix} is {found[suffix].dtype} {list(found[suffix].shape)}, its layout "
                f"needs {spec.dtype} {list(spec.shape)}"
            )


def bitmask_parts(parts: Mapping[str, Tensor], layout: Layout) -> dict[str, Tensor]:
    """The parts of any format, converted to those of `bitmask`, which the kernels use.

    They are what the format `bitmask` would store of the same matrix: see `docs/format.md`.

    Args:
        parts: checked parts of a matrix, by suffix.
        layout: how they are stored.

    Returns:
        `bitmask` uint8 [out, ceil(in / 8)]; and `compressed`, the kept values in row-major order:
        [nnz] of the dtype of the values, or for int4, int3 and int2 one bit stream,
        uint8 [ceil(nnz · bits / 8)]. int8 adds `weight_scale` float32 [out]; the others add
        `weight_scale` uint8 [out, ceil(in / group)] and `weight_exponent` int8 [out].
    """
    if layout.format == "bitmask":
        return dict(parts)
    mask, values = formats[layout.format].kept(parts, layout)
    scales = {s: parts[s] for s in ("weight_scale", "weight_exponent") if s in parts}
    return {"bitmask": pack_bits(mask), "compressed": encode_values(values, layout), **scales}
