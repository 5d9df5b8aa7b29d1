"""Import: read what other tools write, as dense tensors. One file for each kind of source."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from secateur.errors import CheckpointError
from secateur.models.checkpoint import CheckpointReader
from secateur.models.header import TensorEntry
from secateur.registry import Registry

__all__ = [
    "AssembledReader",
    "Assembly",
    "ImportFormat",
    "ImportSource",
    "damaged",
    "import_formats",
]

Parts = Mapping[str, Tensor]
"""Stored tensors, by what each of them is for a matrix."""


@dataclass(frozen=True)
class ImportSource:
    """A folder that another tool wrote.

    Attributes:
        folder: has `config.json` and safetensors.
        config: its `config.json`.
        reader: reads its tensors as they are stored.
        dtype: the dtype of the model's weights, as `config.json` names it.
    """

    folder: Path
    config: Mapping[str, Any]
    reader: CheckpointReader
    dtype: torch.dtype


@dataclass(frozen=True)
class Assembly:
    """A dense tensor, and how it is made from stored parts.

    Attributes:
        parts: the name of each stored part, by what it is.
        shape: of the dense tensor.
        dtype: of the dense tensor.
        stored_as: the format, in a word or two.
        make: returns the dense tensor, in `dtype` or in float64 with the exact values.
    """

    parts: Mapping[str, str]
    shape: tuple[int, ...]
    dtype: torch.dtype
    stored_as: str
    make: Callable[[Parts], Tensor]


class AssembledReader(CheckpointReader):
    """Reads the dense tensors of a source, each made from its parts when it is read.

    Args:
        stored: the tensors as they are stored.
        made: the dense tensors that have parts, by name.
        dropped: stored tensors that are no part of the model, such as scales of activations.
        config: the configuration of the dense model.
        notes: what a user must know, one sentence each.

    Attributes:
        entries: the dense tensors; the offsets of made ones mean nothing.
        rounded: made tensors that were read, and whether their dtype cannot hold the exact values.

    Raises:
        CheckpointError: a dense tensor is stored and made at once.
    """

    def __init__(
        self,
        stored: CheckpointReader,
        made: Mapping[str, Assembly],
        config: Mapping[str, Any],
        *,
        dropped: tuple[str, ...] = (),
        notes: tuple[str, ...] = (),
    ) -> None:
        self.stored, self.made, self.config = stored, made, dict(config)
        self.dropped, self.notes = dropped, notes
        self.folder, self.files = stored.folder, stored.files
        self.rounded: dict[str, bool] = {}
        used = {part for assembly in made.values() for part in assembly.parts.values()}
        gone = used | set(dropped)
        self.entries = {n: entry for n, entry in stored.entries.items() if n not in gone}
        for name, assembly in made.items():
            if name in self.entries:
                raise damaged(f"{name} is stored, and so are parts of it", self.folder)
            first = stored.entries[next(iter(assembly.parts.values()))]
            size = torch.Size(assembly.shape).numel() * assembly.dtype.itemsize
            self.entries[name] = TensorEntry(
                first.file, 0, size, assembly.dtype, tuple(assembly.shape)
            )

    def read(self, name: str) -> Tensor:
        """One dense tensor, in memory of its own.

        Raises:
            CheckpointError: its parts contradict each other.
        """
        assembly = self.made.get(name)
        if assembly is None:
            return self.stored.read(name)
        parts = {role: self.stored.read(part) for role, part in assembly.parts.items()}
        try:
            exact = assembly.make(parts)
        except CheckpointError as error:
            raise CheckpointError(error.what, where=name, remedy=error.remedy) from None
        if tuple(exact.shape) != assembly.shape:
            raise damaged(f"the parts make {list(exact.shape)}, not {list(assembly.shape)}", name)
        value = exact.to(assembly.dtype)
        if not value.isfinite().all():
            raise damaged(f"the parts make numbers that are not finite in {assembly.dtype}", name)
        self.rounded[name] = not torch.equal(value.to(exact.dtype), exact)
        return value.contiguous()


class ImportFormat(Protocol):
    """The contract of a kind of source."""

    name: ClassVar[str]

    def recognises(self, source: ImportSource) -> bool:
        """Whether this is the kind of the source; reads names, dtypes and the configuration."""
        ...

    def open(self, source: ImportSource) -> AssembledReader:
        """Return a reader of the dense tensors.

        Raises:
            CheckpointError: parts are missing, or contradict each other.
            ArchitectureError: the source needs what a plain model cannot express.
        """
        ...


def damaged(what: str, where: object) -> CheckpointError:
    """An error about a file that contradicts itself."""
    return CheckpointError(what, where=str(where), remedy="copy or download the file again")


import_formats: Registry[ImportFormat] = Registry("kind of source", __name__, "import_formats")
