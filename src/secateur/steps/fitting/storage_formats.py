"""How a fit can store a linear, and how many bytes that takes in the files of each target.

| target    | files                                                                         |
|-----------|-------------------------------------------------------------------------------|
| cpu, any  | a packed folder: all levels, zeros by a bitmask; embeddings are int8          |
| llama.cpp | a GGUF file: bfloat16 as BF16, int8 as Q8_0, int4 as Q4_0; embeddings as Q8_0 |

A level is a format that all linears have at once. A GGUF file stores zeros like other weights, so
levels with zeros are not offered for it. No type keeps the numbers of int3.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from secateur.exporting import ExportSource
from secateur.models.checkpoint import shard_files
from secateur.models.configuration import read_configuration
from secateur.progress import Progress
from secateur.quantization.activations import Shares, shares_of
from secateur.runtime.formats import GRID_BITS, Layout, formats
from secateur.runtime.install import open_checkpoint
from secateur.runtime.storage_plan import DEFAULT_GROUP, PackableCheckpoint

HEADER_BYTES = 900
"""Of a matrix in the headers of the files, at most."""

GGUF_NAME = "model"
"""The file is `model-stored.gguf`."""


@dataclass(frozen=True)
class StorageFormat:
    """How linears are stored.

    Attributes:
        values: such as `int4`.
        sparsity: the fraction of zeros.
    """

    values: str
    sparsity: float

    @property
    def name(self) -> str:
        """For people."""
        return f"{self.sparsity:.0%} zeros, {self.values}" if self.sparsity else self.values

    @property
    def family(self) -> str:
        """Which techniques it uses."""
        if self.rounded_inputs is not None:
            return "both" if self.sparsity else "quantize"
        return "prune"

    @property
    def rounded_inputs(self) -> Shares | None:
        """How kernels round the inputs, if the values are integers."""
        return shares_of(self.group) if self.values.startswith("int") else None

    @property
    def group(self) -> int | None:
        """Values that share a scale; None without a grid."""
        return DEFAULT_GROUP if self.values in GRID_BITS else None


LEVELS = (
    StorageFormat("bfloat16", 0.0),
    StorageFormat("int8", 0.0),
    StorageFormat("int4", 0.0),
    StorageFormat("int3", 0.0),
    *(StorageFormat(values, 0.5) for values in ("bfloat16", "int8", "int4", "int3")),
    *(StorageFormat(values, 0.7) for values in ("bfloat16", "int4")),
)
"""The levels; the first is the model itself."""

FINER = tuple(
    StorageFormat(values, sparsity)
    for values in ("int4", "int3")
    for sparsity in (0.3, 0.4, 0.45, 0.55, 0.6, 0.65, 0.7)
    if StorageFormat(values, sparsity) not in LEVELS
)
"""Formats without a level of their own, for mixes that are made whole (`candidates`)."""


def size_of(shape: tuple[int, int], stored: StorageFormat) -> int:
    """Bytes of a matrix in a packed folder: the smaller one of bitmask and dense."""
    nonzeros = round(shape[0] * shape[1] * (1 - stored.sparsity))
    names = ("dense", "bitmask") if stored.sparsity else ("dense",)
    layouts = [Layout(name, stored.values, shape, group=stored.group) for name in names]
    return min(formats[layout.format].nbytes(layout, nonzeros) for layout in layouts)


class TargetFiles(Protocol):
    """The files of a target."""

    @property
    def levels(self) -> tuple[StorageFormat, ...]:
        """The levels that it stores; the first is the model itself."""
        ...

    @property
    def finer(self) -> tuple[StorageFormat, ...]:
        """Formats for mixes that are made whole, besides the levels."""
        ...

    def rest(self, model: PackableCheckpoint) -> int:
        """Bytes of everything that is no linear, at most.

        Args:
            model: dense.

        Raises:
            ArchitectureError: the target does not know this model.
        """
        ...

    def linear(self, shape: tuple[int, int], stored: StorageFormat, packed: float | None) -> float:
        """Bytes of a linear [out, in].

        Args:
            shape: of the linear.
            stored: how it is stored.
            packed: its bytes in a packed folder, if its weights are known.
        """
        ...

    def finish(self, folder: Path, progress: Progress) -> int:
        """Write what the target needs into a packed folder; the bytes of its weight files.

        Args:
            folder: the packed model.
            progress: receives every tensor.
        """
        ...


@dataclass(frozen=True)
class PackedFolder:
    """Files of ours."""

    levels: tuple[StorageFormat, ...] = LEVELS
    finer: tuple[StorageFormat, ...] = FINER

    def rest(self, model: PackableCheckpoint) -> int:
        """Int8 embeddings, norms in bfloat16, headers."""
        total = 4096
        for name, entry in model.reader.entries.items():
            matrix = model.matrices.get(name)
            count = entry.size_bytes // entry.dtype.itemsize
            if matrix is None:
                total += count * min(entry.dtype.itemsize, 2)
            elif matrix.prunable:
                total += HEADER_BYTES
            else:
                total += count + 4 * entry.shape[0]
        return total

    def linear(self, shape: tuple[int, int], stored: StorageFormat, packed: float | None) -> float:
        """What the formats say, of the weights where they are known."""
        return float(size_of(shape, stored)) if packed is None else packed

    def finish(self, folder: Path, progress: Progress) -> int:
        """Nothing is missing."""
        return sum(file.stat().st_size for file in shard_files(folder))


@dataclass(frozen=True)
class GGUFFolder:
    """A packed folder and a GGUF file in it, which is what counts."""

    levels: tuple[StorageFormat, ...] = LEVELS[:3]
    finer: tuple[StorageFormat, ...] = ()

    def rest(self, model: PackableCheckpoint) -> int:
        """Q8_0 embeddings, norms in float32, the vocabulary, headers; exact."""
        from secateur.exporting.gguf.writing import bytes_as_stored

        values = {n: "bfloat16" if x.prunable else "int8" for n, x in model.matrices.items()}
        whole, bare = bytes_as_stored(model.reader, values), self.levels[0]
        shapes = [model.reader.entries[name].shape for name in model.linears.values()]
        return whole - round(sum(self.linear((out, into), bare, None) for out, into in shapes))

    def linear(self, shape: tuple[int, int], stored: StorageFormat, packed: float | None) -> float:
        """Rows of blocks."""
        from secateur.exporting.gguf.writing import bytes_of_matrix

        return float(bytes_of_matrix(shape, stored.values))

    def finish(self, folder: Path, progress: Progress) -> int:
        """Export every matrix in the type nearest to how it is stored."""
        from secateur.exporting.gguf import GGUF

        config, reader = read_configuration(folder), open_checkpoint(folder)
        source = ExportSource(GGUF_NAME, folder, config, reader)
        return GGUF().write(source, "stored", folder, progress).file_bytes


PACKED_FOLDER, GGUF_FILE = PackedFolder(), GGUFFolder()

FILES: Mapping[str, TargetFiles] = {
    "cpu": PACKED_FOLDER,
    "any": PACKED_FOLDER,
    "llama.cpp": GGUF_FILE,
}
"""The files of the targets that a fit can serve."""
