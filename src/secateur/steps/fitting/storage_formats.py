"""How a fit can store a linear and the embeddings, and how many bytes that takes for each target.

| target    | files                                                                         |
|-----------|-------------------------------------------------------------------------------|
| cpu       | a packed folder: all formats, zeros by a bitmask                              |
| llama.cpp | a GGUF file: bfloat16 as BF16, int8 as Q8_0, int4 as Q4_0                     |

Embedding and head are int8, int4 or int3. A GGUF file stores zeros like other weights, so formats
with zeros are not offered for it. No type of its keeps the numbers of int3 and int2.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from secateur.exporting import ExportSource
from secateur.models.checkpoint import shard_files, shard_name
from secateur.models.configuration import read_configuration
from secateur.progress import Progress
from secateur.runtime.formats import GRID_BITS, Layout, PartSpec, formats
from secateur.runtime.install import open_checkpoint
from secateur.runtime.packed import header_bytes
from secateur.runtime.storage_plan import DENSE, PackableCheckpoint

GROUP = 64
"""Values that share a scale."""

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
    def group(self) -> int | None:
        """Values that share a scale; None without a grid."""
        return GROUP if self.values in GRID_BITS else None


VALUES = ("bfloat16", "int8", "int4", "int3", "int2")
SPARSITIES = (0.0, 0.3, 0.4, 0.5, 0.6, 0.7)

FORMATS = tuple(StorageFormat(values, share) for share in SPARSITIES for values in VALUES)
"""All formats of a linear; the first is the model itself."""

EMBEDDINGS = "embeddings"
"""What embedding and head are called among the linears."""

EMBEDDED: Mapping[str, str] = {"int4": "int4", "int3": "int3", "int2": "int3"}
"""The values of embedding and head by those of a format; int8 for all others."""


def embedded(stored: StorageFormat) -> str:
    """The values of embedding and head in a format. They have no zeros."""
    return EMBEDDED.get(stored.values, "int8")


@functools.cache
def stored_bytes(name: str, layout: Layout, nonzeros: int) -> int:
    """Bytes of a matrix in a packed folder, with what the header says of it, at most."""
    packed = layout.integers or layout.format != DENSE
    parts = formats[layout.format].parts(layout, nonzeros)
    described = header_bytes(
        {f"{name}.{suffix}": spec for suffix, spec in parts.items()},
        {name: layout} if packed else {},
    )
    commas = 2  # after other layouts and checksums
    stored = sum(spec.nbytes for spec in parts.values())
    return stored + described - header_bytes({}, {}) + commas


@dataclass(frozen=True)
class PackedFolder:
    """The files of a target: a packed folder.

    Attributes:
        formats: that it stores; the first is the model itself.
    """

    formats: tuple[StorageFormat, ...] = FORMATS

    def rest(self, model: PackableCheckpoint) -> int:
        """Bytes of everything that is no linear and no embedding, at most: norms in bfloat16, and
        what the headers say of them.

        Raises:
            ArchitectureError: the target does not know this model.
        """
        files, names = dict[Path, dict[str, PartSpec]](), model.reader.files
        for name, entry in model.reader.entries.items():
            others = files.setdefault(entry.file, {})
            if name not in model.matrices:
                narrow = entry.dtype if entry.dtype.itemsize < 2 else torch.bfloat16
                others[name] = PartSpec(narrow, entry.shape)
        shards = [shard_name("secateur", number + 1, len(names)) for number in range(len(names))]
        data = sum(spec.nbytes for others in files.values() for spec in others.values())
        return data + sum(header_bytes(others, {}, shards) for others in files.values())

    def matrix(
        self, name: str, shape: tuple[int, int], stored: StorageFormat, kept: float | None = None
    ) -> int:
        """Bytes of a matrix, at most: the smaller one of bitmask and dense.

        Args:
            name: of the matrix, without `.weight`.
            shape: [out, in].
            stored: how it is stored.
            kept: the fraction of nonzeros; None for all that are not pruned. A kept weight that
                rounds to zero is stored as a zero.
        """
        kept = 1 - stored.sparsity if kept is None else kept
        nonzeros = round(shape[0] * shape[1] * kept)
        names = (DENSE, "bitmask") if stored.sparsity else (DENSE,)
        layouts = [Layout(form, stored.values, shape, group=stored.group) for form in names]
        return min(stored_bytes(name, layout, nonzeros) for layout in layouts)

    def finish(self, folder: Path, progress: Progress) -> int:
        """Write what the target needs besides the packed folder; the bytes of its weight files."""
        return sum(file.stat().st_size for file in shard_files(folder))


@dataclass(frozen=True)
class GGUFFolder(PackedFolder):
    """A packed folder and a GGUF file in it, which is what counts."""

    formats: tuple[StorageFormat, ...] = FORMATS[:3]

    def rest(self, model: PackableCheckpoint) -> int:
        """Norms in float32, the vocabulary, headers; exact."""
        from secateur.exporting.gguf.writing import bytes_as_stored

        bare = self.formats[0]
        whole = bytes_as_stored(model.reader, dict.fromkeys(model.matrices, bare.values))
        shapes = [model.reader.entries[name].shape for name in model.matrices]
        return whole - sum(self.matrix("", (out, into), bare) for out, into in shapes)

    def matrix(
        self, name: str, shape: tuple[int, int], stored: StorageFormat, kept: float | None = None
    ) -> int:
        """Rows of blocks."""
        from secateur.exporting.gguf.writing import bytes_of_matrix

        return bytes_of_matrix(shape, stored.values)

    def finish(self, folder: Path, progress: Progress) -> int:
        """Export every matrix in the type nearest to how it is stored."""
        from secateur.exporting.gguf import GGUF

        config, reader = read_configuration(folder), open_checkpoint(folder)
        source = ExportSource(GGUF_NAME, folder, config, reader)
        return GGUF().write(source, "stored", folder, progress).file_bytes


PACKED_FOLDER, GGUF_FILE = PackedFolder(), GGUFFolder()

FILES: Mapping[str, PackedFolder] = {
    "cpu": PACKED_FOLDER,
    "llama.cpp": GGUF_FILE,
}
"""The files of the targets that a fit can serve."""
