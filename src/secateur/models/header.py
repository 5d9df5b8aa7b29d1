"""Reads the header of a safetensors or a GGUF file and trusts nothing in it.

Layout of a safetensors file: 8 bytes, the length of the header, little-endian; the header, JSON;
the data. Every claim of the header is checked against the size of the file before anything is
allocated. The byte ranges must cover the data exactly, and each shape must need exactly the bytes
of its range.

The header of a GGUF file has its metadata, and each tensor's name, type, shape and place. The
format is the specification of ggml (docs/gguf.md there), versions 2 and 3, little-endian. Every
number is checked against the size of the file before it is used.
"""

from __future__ import annotations

import json
import math
import re
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import torch

from secateur.errors import CheckpointError

DTYPES: Mapping[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
}

MAX_HEADER_BYTES = 100_000_000
MAX_DIMENSIONS = 16
MAX_SIDE = 2**40
SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")
"""The escape of half of a character: one of a pair, or a fault."""


@dataclass(frozen=True)
class TensorEntry:
    """The place of one tensor in a file.

    Attributes:
        file: it is in this file.
        offset: its first byte.
        size_bytes: of its values.
        dtype: of its values.
        shape: its sizes.
        strides: elements between neighbours along each axis, for a tensor that is a view of a
            stored one; None where its values follow each other.
    """

    file: Path
    offset: int
    size_bytes: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    strides: tuple[int, ...] | None = None

    @classmethod
    def made(cls, file: Path, dtype: torch.dtype, shape: Sequence[int]) -> TensorEntry:
        """The entry of a tensor that is made of stored ones; its offset means nothing."""
        return cls(file, 0, prod(shape) * dtype.itemsize, dtype, tuple(shape))


@dataclass(frozen=True)
class Header:
    """The content of a header: its tensors by name, and free text by key."""

    entries: dict[str, TensorEntry]
    metadata: dict[str, str]


def damaged(what: str, where: object) -> CheckpointError:
    """An error about a file that contradicts itself."""
    return CheckpointError(what, where=str(where), remedy="copy or download the file again")


def parse_json(text: bytes | str) -> Any:
    """JSON in which no object names a key twice."""

    def without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            names = [name for name, _ in pairs]
            twice = next(name for name in names if names.count(name) > 1)
            raise ValueError(f"{twice!r} occurs twice")
        return found

    try:
        found = json.loads(text, object_pairs_hook=without_repeats)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    raw = text if isinstance(text, bytes) else text.encode("utf-8", "surrogatepass")
    if SURROGATE.search(raw):
        json.dumps(found, ensure_ascii=False).encode()  # halves of a pair are written apart
    return found


def read_header(file: Path) -> Header:
    """Read and check the header of one safetensors file against the size of the file."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 or not 2 <= length <= min(MAX_HEADER_BYTES, size - 8):
            raise damaged(
                f"not a whole safetensors file: {size} bytes, header length {length}", file
            )
        try:
            header = parse_json(stream.read(length))
        except ValueError as error:
            raise damaged(f"the header is not JSON: {error}", file) from None
    if not isinstance(header, dict):
        raise damaged("the header is not a JSON object", file)
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise damaged("the metadata is not a table of texts", file)
    entries = {
        name: _read_entry(file, name, described, 8 + length) for name, described in header.items()
    }
    _check_ranges(file, entries, 8 + length, size)
    return Header(entries, metadata)


def _read_entry(file: Path, name: str, described: Any, start_of_data: int) -> TensorEntry:
    """One tensor's line of the header; its shape must need exactly the bytes it has."""

    def refuse(what: str) -> CheckpointError:
        return damaged(f"tensor {name!r} {what}", file)

    if not isinstance(described, dict) or set(described) != {"dtype", "shape", "data_offsets"}:
        raise refuse("is not described by dtype, shape and data_offsets")
    written, shape, offsets = described["dtype"], described["shape"], described["data_offsets"]
    if not isinstance(written, str) or written not in DTYPES:
        raise CheckpointError(
            f"tensor {name!r} has the unknown dtype {str(written)[:40]}", where=str(file)
        )
    if not is_counts(shape) or len(shape) > MAX_DIMENSIONS or any(s > MAX_SIDE for s in shape):
        raise refuse(f"has the impossible shape {str(shape)[:80]}")
    if not is_counts(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise refuse(f"has the impossible byte range {str(offsets)[:80]}")
    needed, dtype = prod(shape) * DTYPES[written].itemsize, DTYPES[written]
    if needed != offsets[1] - offsets[0]:
        raise refuse(f"has {offsets[1] - offsets[0]} bytes, its shape {shape} needs {needed}")
    return TensorEntry(file, start_of_data + offsets[0], needed, dtype, tuple(shape))


def is_counts(value: Any) -> bool:
    """Whether this is a list of whole numbers from 0."""
    return isinstance(value, list) and all(type(x) is int and x >= 0 for x in value)


def _check_ranges(
    file: Path, entries: Mapping[str, TensorEntry], start_of_data: int, size: int
) -> None:
    """Refuse tensors that overlap, bytes that belong to none, and a file that ends early."""
    expected = max((e.offset + e.size_bytes for e in entries.values()), default=start_of_data)
    if expected != size:
        raise damaged(f"the file has {size} bytes, its header describes {expected}", file)
    end = start_of_data
    for name, entry in sorted(entries.items(), key=lambda x: (x[1].offset, x[1].size_bytes)):
        if entry.offset != end:
            raise damaged(
                f"tensor {name!r} begins at byte {entry.offset}, the one before it ends at {end}",
                file,
            )
        end += entry.size_bytes


MAGIC = b"GGUF"
VERSIONS = (2, 3)
ALIGNMENT = 32
"""Of the tensors' places, unless the metadata says another."""
LONGEST_NAME, MOST_DIMENSIONS = 2**16, 8
SHORT_ARRAY = 16
"""Arrays of the metadata up to this length are kept; of longer ones only type and length."""

SCALARS = {
    0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q",
    12: "<d",
}  # fmt: skip
STRING, ARRAY = 8, 9
TYPE_NAMES = {
    0: "uint8", 1: "int8", 2: "uint16", 3: "int16", 4: "uint32", 5: "int32", 6: "float32",
    7: "bool", 8: "string", 9: "array", 10: "uint64", 11: "int64", 12: "float64",
}  # fmt: skip


@dataclass(frozen=True)
class GgufArray:
    """A long array of the metadata, such as the vocabulary, without its values."""

    type: str
    length: int

    def __str__(self) -> str:
        """Length and type."""
        return f"{self.length:,} x {self.type}"


@dataclass(frozen=True)
class GgufTensor:
    """A tensor as the header describes it.

    Attributes:
        name: such as `blk.0.attn_q.weight`.
        type: of its blocks, such as Q4_K or F16.
        shape: [out, in] for a matrix, as torch orders it.
        offset: of its first byte, from the beginning of the file.
        size_bytes: what it takes in the file.
    """

    name: str
    type: str
    shape: tuple[int, ...]
    offset: int
    size_bytes: int

    @property
    def parameters(self) -> int:
        """How many numbers it holds."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class GgufHeader:
    """The header of a GGUF file.

    Attributes:
        version: of the format.
        metadata: keys and values; long arrays as `GgufArray`.
        tensors: in the order of the file.
        file_bytes: the size of the whole file.
    """

    version: int
    metadata: dict[str, Any]
    tensors: tuple[GgufTensor, ...]
    file_bytes: int


def read_gguf_header(file: Path) -> GgufHeader:
    """Read the header of a GGUF file."""
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            return Reader(stream, size).header()
    except (ValueError, struct.error, OverflowError) as error:
        raise CheckpointError(
            f"the header of the GGUF file cannot be read: {error}",
            where=str(file),
            remedy="copy or download the file again",
        ) from error


class Reader:
    """Reads the parts of a header one after the other."""

    def __init__(self, stream: BinaryIO, size: int) -> None:
        self.stream, self.size = stream, size

    def take(self, count: int) -> bytes:
        """The next bytes."""
        if not 0 <= count <= self.size - self.stream.tell():
            raise ValueError(f"it ends within {count:,} bytes at {self.stream.tell():,}")
        return self.stream.read(count)

    def number(self, form: str) -> Any:
        """The next number."""
        return struct.unpack(form, self.take(struct.calcsize(form)))[0]

    def text(self) -> str:
        """The next string."""
        return self.take(self.number("<Q")).decode("utf-8", "replace")

    def value(self, kind: int) -> Any:
        """The next value of a type."""
        if kind in SCALARS:
            return self.number(SCALARS[kind])
        if kind == STRING:
            return self.text()
        if kind == ARRAY:
            return self.array()
        raise ValueError(f"type {kind} of a value is unknown")

    def array(self) -> list[Any] | GgufArray:
        """The next array."""
        kind, length = self.number("<I"), self.number("<Q")
        if length > self.size - self.stream.tell():
            raise ValueError(f"an array of {length:,} values does not fit the file")
        if length <= SHORT_ARRAY:
            return [self.value(kind) for _ in range(length)]
        if kind in SCALARS:
            self.take(length * struct.calcsize(SCALARS[kind]))
        elif kind == STRING:
            for _ in range(length):
                self.take(self.number("<Q"))
        else:
            raise ValueError(f"a long array of type {kind}")
        return GgufArray(TYPE_NAMES[kind], length)

    def header(self) -> GgufHeader:
        """All of it."""
        magic = self.take(min(4, self.size))
        if magic != MAGIC:
            raise ValueError(f"it begins with {magic!r}, not with {MAGIC!r}")
        version = self.number("<I")
        if version not in VERSIONS:
            raise ValueError(f"version {version} is not one of {', '.join(map(str, VERSIONS))}")
        tensors, entries = self.number("<Q"), self.number("<Q")
        if tensors + entries > self.size:
            raise ValueError(f"{tensors:,} tensors and {entries:,} keys do not fit the file")
        metadata = {}
        for _ in range(entries):
            key = self.text()
            metadata[key] = self.value(self.number("<I"))
        described = [self.tensor() for _ in range(tensors)]
        step = metadata.get("general.alignment", ALIGNMENT)
        if not isinstance(step, int) or step < 1:
            raise ValueError(f"the alignment is {step!r}")
        start = -(-self.stream.tell() // step) * step
        found = tuple(self.placed(*parts, start) for parts in described)
        return GgufHeader(version, metadata, found, self.size)

    def tensor(self) -> tuple[str, tuple[int, ...], int, int]:
        """Name, shape, number of the type, and offset of the next tensor."""
        name, dimensions = self.text(), self.number("<I")
        if len(name) > LONGEST_NAME or dimensions > MOST_DIMENSIONS:
            raise ValueError(f"a tensor has {dimensions} dimensions: {name[:60]!r}")
        shape = tuple(self.number("<Q") for _ in range(dimensions))
        return name, shape[::-1], self.number("<I"), self.number("<Q")

    def placed(
        self, name: str, shape: tuple[int, ...], kind: int, offset: int, start: int
    ) -> GgufTensor:
        """A tensor with its type's name, place and size, if it is within the file."""
        from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

        try:
            of_type = GGMLQuantizationType(kind)
        except ValueError:
            raise ValueError(f"{name} has the unknown type {kind}") from None
        block, block_bytes = GGML_QUANT_SIZES[of_type]
        count = math.prod(shape)
        if shape and shape[-1] % block:
            raise ValueError(f"{name} has rows of {shape[-1]}, in blocks of {block}")
        size = count // block * block_bytes
        if start + offset + size > self.size:
            raise ValueError(f"{name} ends behind the end of the file, which is cut off")
        return GgufTensor(name, of_type.name, shape, start + offset, size)
