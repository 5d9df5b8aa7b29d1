"""Writing a safetensors file tensor by tensor, in any order, with one tensor in memory.

The header comes before the data and describes it, so its length must be known first. Tensors with
known dtype and shape get their place at once, larger dtypes first, so that each is aligned to its
own size. Tensors whose length is not known yet (compressed ones) follow in the order of writing.
The header is written last. Until then the file is no valid safetensors file, and no program can
mistake it for a complete one.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor

from secateur.models.checkpoint import write_all
from secateur.models.header import DTYPES
from secateur.runs.output import cannot_write

PLAIN = {"format": "pt"}
"""The metadata of a file of plain weights, as transformers writes it."""

NAMES = {dtype: name for name, dtype in DTYPES.items()}
LONGEST = 2**50
"""A number with more digits than any offset or length has."""

Described = dict[str, tuple[torch.dtype, tuple[int, ...], int]]
"""Dtype, shape and offset in the data, for each tensor."""


def dtype_name(dtype: torch.dtype) -> str:
    """The name of a dtype in safetensors."""
    return NAMES[dtype]


class ShardWriter:
    """Writes one safetensors file.

    Args:
        file: written over.
        known: dtype and shape of the tensors where they are known.
        appended: names of the tensors of bytes whose length is not known yet.
        longest_metadata: metadata at least as long as the one for `close`.
    """

    def __init__(
        self,
        file: Path,
        known: Mapping[str, tuple[torch.dtype, tuple[int, ...]]],
        appended: list[str],
        longest_metadata: Mapping[str, str],
    ) -> None:
        self.file = file
        self.placed: Described = {}
        self.end = 0
        for name, (dtype, shape) in sorted(known.items(), key=lambda x: -x[1][0].itemsize):
            self.placed[name] = (dtype, shape, self.end)
            self.end += torch.Size(shape).numel() * dtype.itemsize
        unknown: Described = dict.fromkeys(appended, (torch.uint8, (LONGEST,), LONGEST))
        self.waiting = {*known, *appended}
        self.header_bytes = len(header_text(self.placed | unknown, longest_metadata))
        self.header_bytes += -self.header_bytes % 8
        try:
            self.stream = file.open("wb", buffering=0)
        except OSError as error:
            raise cannot_write(error, file) from error

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stream.close()

    def write(self, name: str, tensor: Tensor) -> None:
        """Write one tensor to its place; each must be written once.

        Raises:
            MemoryBudgetError: the disk is full.
        """
        self.waiting.remove(name)
        if name not in self.placed:
            self.placed[name] = (tensor.dtype, tuple(tensor.shape), self.end)
            self.end += tensor.nbytes
        dtype, shape, offset = self.placed[name]
        if (tensor.dtype, tuple(tensor.shape)) != (dtype, shape):
            raise ValueError(f"{name} is {tensor.dtype} {tuple(tensor.shape)}, not {dtype} {shape}")
        try:
            self.stream.seek(8 + self.header_bytes + offset)
            write_all(self.stream, tensor.contiguous())
        except OSError as error:
            raise cannot_write(error, self.file) from error

    def close(self, metadata: Mapping[str, str]) -> None:
        """Write the header, and return when the file would survive a power cut."""
        if self.waiting:
            raise ValueError(f"{len(self.waiting)} tensors were not written: {min(self.waiting)}")
        text = header_text(self.placed, metadata)
        if len(text) > self.header_bytes:
            raise ValueError(f"header of {len(text)} bytes where {self.header_bytes} are kept free")
        try:
            self.stream.seek(0)
            self.stream.write(self.header_bytes.to_bytes(8, "little"))
            self.stream.write(text.ljust(self.header_bytes))
            os.fsync(self.stream.fileno())
        except OSError as error:
            raise cannot_write(error, self.file) from error


def header_text(placed: Described, metadata: Mapping[str, str]) -> bytes:
    """The JSON of a header, tensors in the order of their bytes."""
    header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    for name, (dtype, shape, offset) in sorted(placed.items(), key=lambda x: x[1][2]):
        end = offset + torch.Size(shape).numel() * dtype.itemsize
        header[name] = {
            "dtype": dtype_name(dtype),
            "shape": list(shape),
            "data_offsets": [offset, end],
        }
    return json.dumps(header, separators=(",", ":")).encode()
