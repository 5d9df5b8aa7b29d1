"""Importance matrices: the sums of squared inputs of matrices that llama.cpp's `imatrix` collects.

They are published beside most GGUF files, in one of two forms.

- A GGUF file: of each matrix, `NAME.in_sum2` [experts, columns] and `NAME.counts` [experts], the
  number of tokens that each expert received. A matrix that is not of experts has one row.
- An older file, often `.dat`: names and sums, each divided by its count and multiplied by a number
  of calls, the same for all experts. So it does not say how often an expert was chosen.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import gguf
import numpy as np
import torch
from torch import Tensor

from secateur.errors import CheckpointError, SourceError
from secateur.models.checkpoint import damaged
from secateur.models.gguf_file import MAGIC, GGUFSource

Q = gguf.GGMLQuantizationType
SUMS, COUNTS = ".in_sum2", ".counts"


@dataclass(frozen=True)
class ImportanceMatrix:
    """Sums of squared inputs.

    Attributes:
        sums: Σ x² of each input of each matrix, float64 [experts, columns], by the tensor's name.
        counts: the number of tokens in these sums, int64 [experts].
        has_counts: whether counts are of each expert; in the older form they are not.
    """

    sums: dict[str, Tensor]
    counts: dict[str, Tensor]
    has_counts: bool = True

    @classmethod
    def read(cls, file: Path) -> ImportanceMatrix:
        """Read either form.

        Raises:
            SourceError: there is no such file.
            CheckpointError: the file is damaged, or is no importance matrix.
        """
        if not file.is_file():
            raise SourceError("no such file", where=str(file), remedy="check the path")
        with file.open("rb") as stream:
            if stream.read(len(MAGIC)) != MAGIC:
                stream.seek(0)
                return cls._read_old(stream, file)
        stored, found = GGUFSource.read(file).tensors, cls({}, {})
        for name in [x.removesuffix(SUMS) for x in stored if x.endswith(SUMS)]:
            pair = stored[name + SUMS], stored.get(name + COUNTS)
            if pair[1] is None or any(x.type != Q.F32 for x in pair if x):
                raise damaged(f"{name} has no sums and counts in float32", file)
            sums, counts = (torch.from_numpy(x.read().view(np.float32)) for x in pair if x)
            if sums.numel() % counts.numel():
                raise damaged(f"{name} has {sums.numel()} sums of {counts.numel()} matrices", file)
            _check(name, sums, file)
            _check(name, counts, file)
            found.counts[name] = counts.flatten().round().long()
            found.sums[name] = sums.double().view(counts.numel(), -1)
        if not found.sums:
            raise CheckpointError(
                "the file has no sums of squared inputs, so it is no importance matrix",
                where=str(file),
                remedy="name the imatrix file that belongs to the model",
            )
        return found

    @classmethod
    def _read_old(cls, stream: BinaryIO, file: Path) -> ImportanceMatrix:
        found = cls({}, {}, has_counts=False)
        size_bytes = file.stat().st_size

        def number() -> int:
            raw = stream.read(4)
            return int(*struct.unpack("<i", raw)) if len(raw) == 4 else -1

        def some(count: int, each: int, what: str) -> bytes:
            if not 0 < count * each <= size_bytes - stream.tell():
                raise damaged(f"no importance matrix, or a damaged one: {count} {what}", file)
            return stream.read(count * each)

        entries = number()
        if not 0 < entries <= size_bytes // 12:
            raise damaged(f"no importance matrix: it has {entries} entries", file)
        for _ in range(entries):
            name = some(number(), 1, "bytes of a name").decode(errors="replace")
            calls = max(1, number())
            values = some(number(), 4, f"values of {name}")
            sums = torch.frombuffer(bytearray(values), dtype=torch.float32)
            _check(name, sums, file)
            found.sums[name] = sums.double()[None]
            found.counts[name] = torch.tensor([calls])
        return found


def _check(name: str, values: Tensor, file: Path) -> None:
    """Refuse what is no sum of squares."""
    if not (values.isfinite().all() and (values >= 0).all()):
        raise damaged(f"{name} has values that are no sums of squares", file)
