"""Export: write a model for another engine. One file or folder for each target."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from secateur.models.checkpoint import CheckpointReader
from secateur.models.configuration import read_configuration
from secateur.progress import Progress
from secateur.registry import Registry

__all__ = ["ExportSource", "ExportTarget", "Exported", "targets"]


@dataclass(frozen=True)
class ExportSource:
    """The model to export.

    Attributes:
        reader: reads the tensors of a folder as dense ones. secateur or transformers wrote it,
            compressed or not.
        name: the name for files and for the engine.
    """

    reader: CheckpointReader
    name: str = "model"

    @property
    def folder(self) -> Path:
        """The folder of the model."""
        return self.reader.folder

    @cached_property
    def config(self) -> Mapping[str, Any]:
        """Its `config.json`."""
        return read_configuration(self.folder)


@dataclass
class Exported:
    """What an export wrote.

    Attributes:
        file_bytes: the size of the files.
        types: the number of tensors of each stored type.
        zeros: weights of the matrices that are zero in the source.
        zeros_kept: those that are still exactly zero.
        weights: the number of weights in the matrices.
        notes: what a user must know, one sentence each.
        may_lose_zeros: whether the type has no exact zeros.
    """

    file_bytes: int = 0
    types: dict[str, int] = field(default_factory=dict)
    zeros: int = 0
    zeros_kept: int = 0
    weights: int = 0
    notes: list[str] = field(default_factory=list)
    may_lose_zeros: bool = False

    def count_tensor(self, type: str) -> None:
        """Count one stored tensor of a type."""
        self.types[type] = self.types.get(type, 0) + 1

    def count_matrix(self, weight: Tensor, stored: Tensor) -> bool:
        """Count the weights of a matrix, and its zeros before and after.

        Args:
            weight: in the source.
            stored: the weights that the engine will compute with, of the same shape.

        Returns:
            Whether they are the same numbers in the dtype of the source.
        """
        zero = weight == 0
        self.weights += weight.numel()
        self.zeros += int(zero.sum())
        self.zeros_kept += int((zero & (stored == 0)).sum())
        return torch.equal(stored.to(weight.dtype), weight)


class ExportTarget(Protocol):
    """The contract of an export target."""

    name: ClassVar[str]

    types: ClassVar[tuple[str, ...]]
    """The types in which matrices can be stored; the first is the default."""

    def write(self, source: ExportSource, type: str, output: Path, progress: Progress) -> Exported:
        """Write the model.

        Everything that the engine would not compute alike is refused before a file is opened.

        Args:
            source: the model.
            type: a name in `types`.
            output: an empty folder for the files.
            progress: receives every tensor.

        Raises:
            ExportError: the engine does not know this model, or computes or tokenizes it
                differently.
            RecipeError: a package that the target needs is not installed.
        """
        ...


targets: Registry[ExportTarget] = Registry("target", __name__)
