"""Bytes of a packed model, by arithmetic."""

from __future__ import annotations

from collections.abc import Mapping

from secateur.models.checkpoint import CheckpointReader
from secateur.runtime.choice import DEFAULT_GROUP
from secateur.runtime.formats import GRID_BITS, Layout, formats
from secateur.workflows.compress.packable import PackableMatrix
from secateur.workflows.fit.kinds import LevelKind

HEADER_BYTES = 900
"""Of a matrix in the headers of the files, at most."""


def other_bytes(reader: CheckpointReader, matrices: Mapping[str, PackableMatrix]) -> int:
    """Bytes of everything that is no linear: int8 embeddings, norms in bfloat16, headers."""
    total = 4096
    for name, entry in reader.entries.items():
        matrix = matrices.get(name)
        count = entry.size_bytes // entry.dtype.itemsize
        if matrix is None:
            total += count * min(entry.dtype.itemsize, 2)
        elif matrix.prunable:
            total += HEADER_BYTES
        else:
            total += count + 4 * entry.shape[0]
    return total


def as_seen(reader: CheckpointReader, name: str, matrix: PackableMatrix) -> tuple[int, int]:
    """The shape [out, in] of a stored matrix."""
    first, second = reader.entries[name].shape
    return (second, first) if matrix.transposed else (first, second)


def size_of(shape: tuple[int, int], kind: LevelKind) -> int:
    """Bytes of a matrix on a level: the smaller one of bitmask and dense."""
    group = DEFAULT_GROUP if kind.values in GRID_BITS else None
    nonzeros = round(shape[0] * shape[1] * (1 - kind.sparsity))
    names = ("dense", "bitmask") if kind.sparsity else ("dense",)
    layouts = [Layout(name, kind.values, shape, group=group) for name in names]
    return min(formats[layout.format].nbytes(layout, nonzeros) for layout in layouts)
