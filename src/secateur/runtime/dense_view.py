"""Shows a compressed checkpoint as a dense one."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from secateur.models.checkpoint import CheckpointReader
from secateur.models.header import TensorEntry
from secateur.models.opening import computed_dtype, open_weights
from secateur.quantization.groups import Scales
from secateur.runtime.formats import Layout, PartSpec, formats
from secateur.runtime.packed import PackedCheckpoint, is_packed


@dataclass(frozen=True)
class StoredIntegers:
    """A matrix of integers with scales.

    Attributes:
        bits: of an integer.
        codes: the integers, int8 [out, in].
        scale: float32 [out, groups].
    """

    bits: int
    codes: Tensor
    scale: Tensor


class DenseView(CheckpointReader):
    """Reads a compressed checkpoint like a dense one: a matrix is unpacked when it is read.

    Names, shapes and dtypes are those of the source checkpoint. Matrices of integers with scales
    are returned in the dtype that `config.json` names, or in `computed`.

    Args:
        packed: the compressed checkpoint.
        computed: the dtype for matrices of integers; None for that of `config.json`.

    Attributes:
        entries: the dense tensors; their offsets mean nothing.
    """

    def __init__(self, packed: PackedCheckpoint, computed: torch.dtype | None = None) -> None:
        self.packed, self.folder, self.files = packed, packed.folder, packed.files
        self.computed = computed or computed_dtype(packed.folder)
        self.entries = {}
        for name in packed.order:
            layout = packed.layouts.get(name)
            if layout is None:
                file, spec = packed.entries[name].file, packed.specs[name]
                self.entries[name] = entry_of(file, spec)
            else:
                file = packed.entries[f"{name}.{packed.parts_of(name)[0]}"].file
                self.entries[f"{name}.weight"] = entry_of(file, self.dense_spec(layout))

    def dense_spec(self, layout: Layout) -> PartSpec:
        """Dtype and shape of the matrix in the dense checkpoint."""
        dtype = self.computed if layout.integers else layout.dtype
        return PartSpec(dtype, layout.shape[::-1] if layout.transposed else layout.shape)

    def layout_of(self, name: str) -> dict[str, Any] | None:
        """The layout of a dense tensor; None if it is stored unchanged."""
        layout = self.packed.layouts.get(name.removesuffix(".weight"))
        return None if layout is None else layout.to_json()

    def read(self, name: str) -> Tensor:
        """One dense tensor, in memory of its own.

        Raises:
            CheckpointError: damaged.
        """
        owner = name.removesuffix(".weight")
        layout = self.packed.layouts.get(owner)
        if layout is None or owner == name:
            return self.packed.read(name)
        weight = formats[layout.format].unpack(self.packed.parts(owner), layout)
        weight = weight.to(self.entries[name].dtype)
        return weight.t().contiguous() if layout.transposed else weight

    def integers(self, name: str) -> StoredIntegers | None:
        """A matrix as it is stored, if it is stored as integers; None for any other tensor.

        The dense matrix in the dtype of the computation may have fewer bits than scale times
        integer.

        Raises:
            CheckpointError: damaged.
        """
        owner = name.removesuffix(".weight")
        layout = self.packed.layouts.get(owner)
        if layout is None or owner == name or not layout.integers:
            return None
        parts = self.packed.parts(owner)
        mask, values = formats[layout.format].kept(parts, layout)
        codes = torch.zeros(layout.shape, dtype=torch.int8).masked_scatter_(mask, values)
        if layout.grid is None:
            return StoredIntegers(8, codes, parts["weight_scale"][:, None])
        scales = Scales(parts["weight_exponent"], parts["weight_scale"])
        return StoredIntegers(layout.grid.bits, codes, scales.values)

    def mapped(self, names: list[str]) -> Iterator[tuple[str, Tensor]]:
        """The tensors one after the other, read, since packed ones cannot be mapped."""
        for name in names:
            yield name, self.read(name)


def entry_of(file: Path, spec: PartSpec) -> TensorEntry:
    """An entry for a dense tensor that no file contains."""
    return TensorEntry(file, 0, spec.nbytes, spec.dtype, spec.shape)


def open_checkpoint(folder: Path) -> CheckpointReader:
    """A reader of dense tensors for a folder, compressed or stored in any form, or plain.

    Raises:
        CheckpointError: a file is damaged or missing, or the form is not read.
    """
    return DenseView(PackedCheckpoint(folder)) if is_packed(folder) else open_weights(folder)
