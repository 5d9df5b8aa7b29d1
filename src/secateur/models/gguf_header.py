"""The header of a GGUF file: its metadata, and each tensor's name, type, shape and place.

No weight is read. The format is the specification of ggml (docs/gguf.md there), versions 2 and 3,
little-endian. Every number is checked against the size of the file before it is used.
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from secateur.errors import CheckpointError

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
