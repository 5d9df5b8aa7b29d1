"""Reads GGUF files: the metadata, the places of the tensors, and their bytes by row.

    magic GGUF · version 2 or 3 · number of tensors · number of keys         little-endian
    keys      name · type of value · value        an array: type of items · count · items
    tensors   name · number of sizes · sizes, innermost first · type of block · offset
    data      each tensor at a multiple of `general.alignment`

Nothing in a header is trusted. Every length and count is checked against the size of the file
before anything is allocated, and every tensor has its own bytes within the file. The header is
read as far as it reaches; of the data, only the rows that a caller names.

A model can be in several files, `NAME-00001-of-0000N.gguf`. The first has the metadata of all.
"""

from __future__ import annotations

import hashlib
import re
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import gguf
import numpy as np
from gguf import GGMLQuantizationType, GGUFValueType
from numpy.typing import NDArray

from secateur.errors import CheckpointError
from secateur.models.checkpoint import damaged

MAGIC, VERSIONS = b"GGUF", (2, 3)
BLOCKS: Mapping[GGMLQuantizationType, tuple[int, int]] = gguf.GGML_QUANT_SIZES
"""Weights and bytes of a block, for each type of ggml."""
MAX_HEADER_BYTES = 2**29
MAX_NAME_BYTES, MAX_DIMENSIONS = 63, 4
"""The limits of ggml for a tensor."""
FIRST_BYTES = 2**20
"""So much of a file is read at once to find its header; then, each time, twice as much."""
SAMPLES, SAMPLE_BYTES = 1024, 4096
"""What is read of the data to tell a file from another; all of it would take as long as a copy."""
PART = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf")
ALIGNMENT = "general.alignment"
SPLIT_NUMBER, SPLIT_COUNT, SPLIT_TENSORS = "split.no", "split.count", "split.tensors.count"

SCALARS: Mapping[GGUFValueType, np.dtype[Any]] = {
    kind: np.dtype(kind.name.lower()).newbyteorder("<")
    for kind in GGUFValueType
    if kind not in (GGUFValueType.STRING, GGUFValueType.ARRAY)
}
"""NumPy's dtype of each type of value."""


@dataclass(frozen=True, eq=False)
class Field:
    """One value of the metadata.

    Attributes:
        type: of the value.
        value: an int, a float, a bool or a text; of an array, a list of texts or a NumPy array.
        items: the type of the items of an array.

    Example:
        >>> from gguf import GGUFValueType
        >>> from secateur.models.gguf_file import Field
        >>> Field(GGUFValueType.UINT32, 8).like(6).encoded()
        b'\\x04\\x00\\x00\\x00\\x06\\x00\\x00\\x00'
    """

    type: GGUFValueType
    value: Any
    items: GGUFValueType | None = None

    def like(self, value: Any) -> Field:
        """Another value of the same type."""
        return replace(self, value=value)

    @classmethod
    def text(cls, value: str) -> Field:
        """A text."""
        return cls(GGUFValueType.STRING, value)

    def encoded(self) -> bytes:
        """Type and value, as they stand after a key.

        Raises:
            OverflowError: a number is too large for its type.
        """
        if self.items is None:
            return struct.pack("<I", self.type) + _packed(self.type, [self.value])
        head = struct.pack("<IIQ", self.type, self.items, len(self.value))
        return head + _packed(self.items, self.value)


def _packed(kind: GGUFValueType, values: Sequence[Any]) -> bytes:
    """Values of one type, one after the other."""
    if kind == GGUFValueType.STRING:
        return b"".join(map(counted, values))
    if isinstance(values, np.ndarray):
        return values.astype(SCALARS[kind], casting="safe").tobytes()
    return np.array(values, SCALARS[kind]).tobytes()


def counted(text: str) -> bytes:
    """A text in UTF-8, with its length before it."""
    encoded = text.encode()
    return struct.pack("<Q", len(encoded)) + encoded


@dataclass(frozen=True)
class StoredTensor:
    """The place of one tensor.

    Attributes:
        name: of the tensor.
        shape: its sizes, outermost first, as torch has them.
        type: of its blocks.
        file: it is in this file.
        offset: its first byte in the file.
        nbytes: of its blocks.
    """

    name: str
    shape: tuple[int, ...]
    type: GGMLQuantizationType
    file: Path
    offset: int
    nbytes: int

    @property
    def row_bytes(self) -> int:
        """Bytes of one row of the outermost dimension: of an expert, a token or an output.

        Raises:
            CheckpointError: a vector of blocks has no rows.
        """
        if len(self.shape) == 1 and BLOCKS[self.type][0] > 1:
            raise CheckpointError(
                f"the vector has {self.type.name} blocks, which cannot be divided",
                where=f"{self.file}: {self.name}",
                remedy="convert the file again with this tensor as F32 or F16",
            )
        return self.nbytes // self.shape[0]

    def read(self, rows: Sequence[int] | slice = slice(None)) -> NDArray[np.uint8]:
        """The bytes of rows of the outermost dimension, uint8 [rows, bytes of a row].

        Args:
            rows: their numbers, or a slice with step 1.

        Raises:
            CheckpointError: the file is shorter than it was.
        """
        numbers = range(self.shape[0])[rows] if isinstance(rows, slice) else rows
        runs = runs_of(numbers)
        found = np.empty((sum(count for _, count in runs), self.row_bytes), np.uint8)
        at = 0
        with self.file.open("rb") as stream:
            for first, count in runs:
                stream.seek(self.offset + first * self.row_bytes)
                if stream.readinto(found[at : at + count]) != count * self.row_bytes:  # type: ignore[arg-type]
                    raise damaged(f"{self.name} ends before its last row", self.file)
                at += count
        return found


def runs_of(rows: Iterable[int]) -> list[tuple[int, int]]:
    """First row and number of rows, for each run of neighbours.

    Example:
        >>> from secateur.models.gguf_file import runs_of
        >>> runs_of([0, 1, 2, 5, 4])
        [(0, 3), (5, 1), (4, 1)]
    """
    numbers = np.array([*rows], np.int64)
    ends = np.flatnonzero(np.diff(numbers) != 1) + 1
    return [(int(run[0]), len(run)) for run in np.split(numbers, ends) if len(run)]


def block_bytes(shape: Sequence[int], kind: GGMLQuantizationType) -> int:
    """Bytes of a tensor whose innermost size is a multiple of its blocks."""
    weights, size = BLOCKS[kind]
    return prod(shape) // weights * size


@dataclass(frozen=True)
class FilePart:
    """One file.

    Attributes:
        file: its place.
        fields: its metadata, in the order of the file.
        tensors: in the order of the file.
        alignment: of the tensors, in bytes.
        size_bytes: of the file.
        header_digest: SHA-256 of the header.
    """

    file: Path
    fields: dict[str, Field]
    tensors: dict[str, StoredTensor]
    alignment: int
    size_bytes: int
    header_digest: str

    def sampled(self) -> str:
        """SHA-256 of the header, the size, and samples spread over the data."""
        digest = hashlib.sha256(f"{self.header_digest} {self.size_bytes}".encode())
        with self.file.open("rb") as stream:
            for number in range(SAMPLES):
                stream.seek(self.size_bytes * number // SAMPLES)
                digest.update(stream.read(SAMPLE_BYTES))
        return digest.hexdigest()


@dataclass(frozen=True)
class GGUFSource:
    """A GGUF file, or all parts of one.

    Attributes:
        parts: the files.
        fields: the metadata of the first file, which is that of the model.
        tensors: of all parts, in order.
    """

    parts: tuple[FilePart, ...]
    fields: dict[str, Field]
    tensors: dict[str, StoredTensor]

    @classmethod
    def read(cls, path: str | Path) -> GGUFSource:
        """Read the headers of a file, or of all its parts if it is one of several.

        Args:
            path: a file; of several, any one.

        Raises:
            CheckpointError: a file is damaged, of another version, missing, or of another model.
        """
        path = Path(path).expanduser()
        named = read_part(path)
        files = _part_files(path, named)
        return cls.of_parts([named if file == path else read_part(file) for file in files])

    @classmethod
    def of_parts(cls, parts: Sequence[FilePart]) -> GGUFSource:
        """A model from all its parts, the first one first."""
        tensors = dict(chain.from_iterable(part.tensors.items() for part in parts))
        held, count = sum(len(part.tensors) for part in parts), len(parts)
        for number, part in enumerate(parts):
            own = [count_of(part, key, -1) for key in (SPLIT_NUMBER, SPLIT_COUNT, SPLIT_TENSORS)]
            if count > 1 and own != [number, count, held]:
                raise damaged(
                    f"the file says that it is part {own[0] + 1} of {own[1]}, with {own[2]} "
                    f"tensors in all; it is named {number + 1} of {count}, and all have {held}",
                    part.file,
                )
        if len(tensors) < held:
            raise damaged("two parts have a tensor of the same name", parts[0].file)
        return cls(tuple(parts), parts[0].fields, tensors)

    @property
    def file(self) -> Path:
        """The file, or the first of several."""
        return self.parts[0].file

    @property
    def size_bytes(self) -> int:
        """Of all files."""
        return sum(part.size_bytes for part in self.parts)

    @property
    def architecture(self) -> str:
        """`general.architecture`.

        Raises:
            CheckpointError: the file names none; it is no model.
        """
        field = self.fields.get("general.architecture")
        if field is None or field.type != GGUFValueType.STRING:
            kind = self.fields.get("general.type")
            raise CheckpointError(
                "the file names no architecture"
                + (f": it is of type {kind.value}" if kind else ""),
                where=str(self.file),
                remedy="name the GGUF file of a model",
            )
        return str(field.value)

    def get(self, name: str, default: Any = None) -> Any:
        """The value of a key of the architecture: of `llama.NAME`, in a file of llama."""
        field = self.fields.get(f"{self.architecture}.{name}")
        return default if field is None else field.value

    def identity(self) -> dict[str, str]:
        """What tells the files from others, by name: SHA-256 of header and samples of the data."""
        return {part.file.name: part.sampled() for part in self.parts}


def _part_files(path: Path, part: FilePart) -> list[Path]:
    """The files of all parts, from one of them."""
    count = count_of(part, SPLIT_COUNT)
    if count <= 1:
        return [path]
    match = PART.fullmatch(path.name)
    if match is None or int(match["count"]) != count:
        raise CheckpointError(
            f"the file is one of {count} parts, and its name does not say which",
            where=str(path),
            remedy=f"give all parts their names again: NAME-00001-of-{count:05}.gguf",
        )
    files = [part_name(path, number, count) for number in range(count)]
    if missing := [file.name for file in files if not file.is_file()]:
        raise CheckpointError(
            f"{len(missing)} of {count} parts are missing: {', '.join(missing[:3])}",
            where=str(path.parent),
            remedy="copy or download all parts into one folder",
        )
    return files


def part_name(output: Path, number: int, count: int) -> Path:
    """The file of part `number` (from 0) of a result; of one part it is the output itself."""
    if count == 1:
        return output
    match = PART.fullmatch(output.name)
    stem = match["stem"] if match else output.stem
    return output.with_name(f"{stem}-{number + 1:05}-of-{count:05}.gguf")


def count_of(source: GGUFSource | FilePart, key: str, default: int = 0) -> int:
    """The value of a key that is a count.

    Raises:
        CheckpointError: it is no small whole number.
    """
    if key not in source.fields:
        return default
    value = source.fields[key].value
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 2**31:
        raise damaged(f"{key} is {str(value)[:80]}, not a count", source.file)
    return value


def read_part(file: Path) -> FilePart:
    """Read the header of one file.

    Raises:
        CheckpointError: it is damaged, or of a version or byte order that is not read.
    """
    try:
        with file.open("rb") as stream:
            return _Header(file, stream).part()
    except OSError as error:
        raise CheckpointError(
            f"the file cannot be read: {error.strerror or error}",
            where=str(file),
            remedy="check its name and its permissions",
        ) from error


class _Header:
    """A cursor over the header of one file, which knows where the file ends.

    Args:
        file: its place.
        stream: of the file.
    """

    def __init__(self, file: Path, stream: BinaryIO) -> None:
        self.file, self.stream, self.data, self.at = file, stream, b"", 0
        self.size_bytes = stream.seek(0, 2)
        stream.seek(0)

    def part(self) -> FilePart:
        """Everything in the header."""
        tensors, keys = self.counts()
        fields: dict[str, Field] = {}
        for number in range(keys):
            key = self.text(f"the name of key {number + 1}")
            if key in fields:
                raise self.bad(f"the key {key} is there twice")
            fields[key] = self.field(key)
        alignment = self.alignment(fields.get(ALIGNMENT))
        described = [self.tensor(number, alignment) for number in range(tensors)]
        start = self.at + -self.at % alignment
        placed = [replace(each, offset=start + each.offset) for each in described]
        names = {tensor.name: tensor for tensor in placed}
        if len(names) < tensors:
            raise self.bad("two tensors have the same name")
        end, before = start, ""
        for each in sorted(placed, key=lambda tensor: tensor.offset):
            if each.offset < end:
                raise self.bad(f"the tensors {before} and {each.name} overlap")
            end, before = each.offset + each.nbytes, each.name
            if end > self.size_bytes:
                raise self.bad(
                    f"the tensor {before} ends at byte {end}, and the file has {self.size_bytes} "
                    "bytes"
                )
        digest = hashlib.sha256(self.data[: self.at]).hexdigest()
        return FilePart(self.file, fields, names, alignment, self.size_bytes, digest)

    def bad(self, what: str) -> CheckpointError:
        """The error of a file that is not as it should be."""
        return damaged(what, self.file)

    # -- bytes -----------------------------------------------------------------------------------

    def reach(self, end: int, what: str) -> bytes:
        """The header so far, at least up to `end`.

        Raises:
            CheckpointError: the file ends before, or the header is too long.
        """
        if end > self.size_bytes:
            raise self.bad(f"{what} ends at byte {end}, and the file has {self.size_bytes} bytes")
        if end > MAX_HEADER_BYTES:
            raise self.bad(f"the header is longer than {MAX_HEADER_BYTES} bytes: {what}")
        if end > len(self.data):
            more = max(end - len(self.data), len(self.data), FIRST_BYTES)
            self.data += self.stream.read(min(more, self.size_bytes - len(self.data)))
        if end > len(self.data):
            raise self.bad(f"{what} ends at byte {end}, and the file became shorter")
        return self.data

    def take(self, count: int, what: str) -> bytes:
        """The next bytes."""
        begin, self.at = self.at, self.at + count
        return self.reach(self.at, what)[begin : self.at]

    def number(self, form: str, what: str) -> int:
        """The next whole number."""
        value: int
        [value] = struct.unpack(form, self.take(struct.calcsize(form), what))
        return value

    def text(self, what: str) -> str:
        """The next text."""
        return self.texts(1, what)[0]

    def texts(self, count: int, what: str) -> list[str]:
        """The next texts. A vocabulary has hundreds of thousands, so this loop is bare."""
        self.room(count, 8, what)
        found, data, at = [], self.data, self.at
        for _ in range(count):
            begin = at + 8
            if begin > len(data):
                data = self.reach(begin, what)
            end = begin + int.from_bytes(data[at:begin], "little")
            if end > len(data):
                data = self.reach(end, what)
            found.append(data[begin:end])
            at = end
        self.at = at
        try:
            return [text.decode() for text in found]
        except UnicodeDecodeError as error:
            raise self.bad(f"{what} is no UTF-8: {error.object[:40]!r}") from None

    def room(self, count: int, least_bytes: int, what: str) -> None:
        """Refuse a count of things that the rest of the file cannot hold."""
        if count * least_bytes > self.size_bytes - self.at:
            left = self.size_bytes - self.at
            raise self.bad(f"{what}: {count} do not fit into the last {left} bytes of the file")

    # -- entries ---------------------------------------------------------------------------------

    def counts(self) -> tuple[int, int]:
        """The numbers of tensors and keys, after magic and version."""
        magic = self.reach(min(4, self.size_bytes), "the file")[:4]
        if magic != MAGIC:
            raise self.bad(f"not a GGUF file: it begins with {magic!r}")
        self.at = 4
        version = self.number("<I", "the version")
        if version not in VERSIONS:
            swapped = int.from_bytes(version.to_bytes(4, "little"), "big")
            raise CheckpointError(
                "the file is for machines with big-endian numbers"
                if swapped in VERSIONS
                else f"the file has version {version} of GGUF, and 2 and 3 are read",
                where=str(self.file),
                remedy="convert the model again with a current llama.cpp on a common machine",
            )
        tensors, keys = (self.number("<Q", "the head of the file") for _ in range(2))
        self.room(keys, 13, "keys")
        self.room(tensors, 32, "tensors")
        return tensors, keys

    def type_of(self, what: str) -> GGUFValueType:
        """The next type of value."""
        number = self.number("<I", what)
        try:
            return GGUFValueType(number)
        except ValueError:
            raise self.bad(f"{what} has the unknown type {number}") from None

    def field(self, key: str) -> Field:
        """The value of a key."""
        what = f"the value of {key}"
        kind = self.type_of(what)
        if kind != GGUFValueType.ARRAY:
            [value] = self.values(kind, 1, what)
            return Field(kind, value.item() if isinstance(value, np.generic) else value)
        items = self.type_of(what)
        if items == GGUFValueType.ARRAY:
            raise self.bad(f"{what} is an array of arrays, which llama.cpp does not read")
        return Field(kind, self.values(items, self.number("<Q", what), what), items)

    def values(self, kind: GGUFValueType, count: int, what: str) -> Any:
        """The next values of one type: texts as a list, numbers as a NumPy array."""
        if kind == GGUFValueType.STRING:
            return self.texts(count, what)
        dtype = SCALARS[kind]
        self.room(count, dtype.itemsize, what)
        found = np.frombuffer(self.take(count * dtype.itemsize, what), dtype)
        if kind == GGUFValueType.BOOL and (found.view(np.uint8) > 1).any():
            raise self.bad(f"{what} is neither true nor false")
        return found

    def alignment(self, field: Field | None) -> int:
        """Of the tensors, in bytes."""
        if field is None:
            return gguf.GGUF_DEFAULT_ALIGNMENT
        value = field.value
        if field.type != GGUFValueType.UINT32 or value <= 0 or value & (value - 1):
            raise self.bad(f"{ALIGNMENT} is {str(value)[:80]!r}, not a power of two")
        return int(value)

    def tensor(self, number: int, alignment: int) -> StoredTensor:
        """The next tensor. Its offset is from the beginning of the data."""
        name = self.text(f"the name of tensor {number + 1}")
        what = f"the tensor {name[:80]}"
        if not 0 < len(name.encode()) <= MAX_NAME_BYTES:
            raise self.bad(f"{what} has a name of {len(name.encode())} bytes")
        dimensions = self.number("<I", what)
        if not 0 < dimensions <= MAX_DIMENSIONS:
            raise self.bad(f"{what} has {dimensions} dimensions, not 1 to 4")
        shape = tuple(self.number("<Q", what) for _ in range(dimensions))[::-1]
        number, offset = self.number("<I", what), self.number("<Q", what)
        try:
            kind = GGMLQuantizationType(number)
        except ValueError:
            raise CheckpointError(
                f"{what} has the unknown type {number}",
                where=str(self.file),
                remedy="copy the file again; if it is whole, its type is newer than the installed "
                "gguf: pip install --upgrade gguf",
            ) from None
        if min(shape) == 0 or prod(shape) >= 2**63:
            raise self.bad(f"{what} has the shape {shape}")
        weights, _ = BLOCKS[kind]
        if shape[-1] % weights:
            raise self.bad(
                f"{what} has rows of {shape[-1]} weights, and {kind.name} has blocks of {weights}"
            )
        if offset % alignment:
            raise self.bad(f"{what} is at byte {offset} of the data, no multiple of {alignment}")
        return StoredTensor(name, shape, kind, self.file, offset, block_bytes(shape, kind))
