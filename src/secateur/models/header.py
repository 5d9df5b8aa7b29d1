"""Reads the header of a safetensors file and trusts nothing in it.

Layout of a safetensors file: 8 bytes, the length of the header, little-endian; the header, JSON;
the data. Every claim of the header is checked against the size of the file before anything is
allocated. The byte ranges must cover the data exactly, and each shape must need exactly the bytes
of its range.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

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


class Header(dict[str, TensorEntry]):
    """The tensors of a file by name.

    Attributes:
        metadata: free text by key.
    """

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
        # before so many bytes are read
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
    entries = Header(
        {name: _read_entry(file, name, described, 8 + length) for name, described in header.items()}
    )
    _check_ranges(file, entries, 8 + length, size)
    entries.metadata = metadata
    return entries


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
    if not _is_counts(shape) or len(shape) > MAX_DIMENSIONS or any(s > MAX_SIDE for s in shape):
        raise refuse(f"has the impossible shape {str(shape)[:80]}")
    if not _is_counts(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise refuse(f"has the impossible byte range {str(offsets)[:80]}")
    needed, dtype = prod(shape) * DTYPES[written].itemsize, DTYPES[written]
    if needed != offsets[1] - offsets[0]:
        raise refuse(f"has {offsets[1] - offsets[0]} bytes, its shape {shape} needs {needed}")
    return TensorEntry(file, start_of_data + offsets[0], needed, dtype, tuple(shape))


def _is_counts(value: Any) -> bool:
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
    # an empty tensor begins where the next one does, so it comes first
    for name, entry in sorted(entries.items(), key=lambda x: (x[1].offset, x[1].size_bytes)):
        if entry.offset != end:
            raise damaged(
                f"tensor {name!r} begins at byte {entry.offset}, the one before it ends at {end}",
                file,
            )
        end += entry.size_bytes
