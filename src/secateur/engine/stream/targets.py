"""Where the layers of the model being pruned live: in memory, or in a checkpoint on disk."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import nn

from secateur.models.architecture import Architecture, describe
from secateur.models.checkpoint import CheckpointReader, PatchedCopy
from secateur.models.inventory import (
    StoredMatrix,
    inventory,
    inventory_of,
    stored_linears,
    stored_shapes,
)
from secateur.models.skeleton import (
    assign,
    build_skeleton,
    empty,
    fill,
    fill_buffers,
    model_names,
    stored_names,
)

__all__ = ["CheckpointTarget", "ModelTarget", "Target"]


class Target(Protocol):
    """A model whose decoder layers are taken in work one at a time."""

    model: Any
    architecture: Architecture
    device: torch.device
    dtype: torch.dtype

    @property
    def layers(self) -> nn.ModuleList:
        """The decoder layers; those not in work may be empty."""
        ...

    def matrices(self) -> list[StoredMatrix]:
        """Every floating-point tensor of two or more dimensions, as it is stored."""
        ...

    def outside(self) -> Any:
        """A context in which everything outside the decoder layers has its weights."""
        ...

    def layer(self, index: int) -> Any:
        """A context in which one decoder layer has its weights, on the device of the run."""
        ...

    def commit(self, index: int, names: list[str]) -> None:
        """Make the new values of some parameters of the layer in work last."""
        ...


class ModelTarget:
    """A loaded model, pruned in place.

    Args:
        model: a causal language model of transformers, or any module described by `architecture`.
        architecture: its description; found by `describe` when None.
    """

    def __init__(self, model: Any, architecture: Architecture | None = None) -> None:
        self.model = model
        self.architecture = architecture or describe(model)
        self.device = next(model.parameters()).device
        self.dtype = next(model.parameters()).dtype

    @property
    def layers(self) -> nn.ModuleList:
        """The decoder layers."""
        return self.architecture.layers(self.model)

    def matrices(self) -> list[StoredMatrix]:
        """Every floating-point parameter of two or more dimensions, shared ones once."""
        return inventory_of(self.model, self.architecture)

    @contextmanager
    def outside(self) -> Iterator[None]:
        """Nothing to do: a loaded model has all its weights."""
        yield

    @contextmanager
    def layer(self, index: int) -> Iterator[nn.Module]:
        """The layer itself."""
        yield self.layers[index]

    def commit(self, index: int, names: list[str]) -> None:
        """Nothing to do: the layer was changed in place."""


class CheckpointTarget:
    """A checkpoint on disk, its layers read when needed and written to a copy.

    Args:
        reader: the source.
        output: the copy that takes the new weights; None to only look.
        device: where layers are worked on.
        dtype: of the computation; None for what `config.json` says.
        trust_remote_code: whether code that comes with the checkpoint may run.
    """

    def __init__(
        self,
        reader: CheckpointReader,
        output: PatchedCopy | None,
        device: torch.device,
        *,
        dtype: torch.dtype | None = None,
        trust_remote_code: bool = False,
    ) -> None:
        self.reader, self.output, self.device = reader, output, device
        self.model = build_skeleton(reader.folder, dtype=dtype, trust_remote_code=trust_remote_code)
        self.architecture = describe(self.model)
        self.dtype = self.model.dtype
        self.stored = stored_names(self.model, reader)
        stored_linears(self.model, self.architecture, self.stored)  # refuses what is missing
        fill_buffers(self.model, reader)

    @property
    def layers(self) -> nn.ModuleList:
        """The decoder layers, on the meta device unless in work."""
        return self.architecture.layers(self.model)

    def matrices(self) -> list[StoredMatrix]:
        """Every floating-point tensor of two or more dimensions, as it is stored."""
        names, shapes = model_names(self.model, self.reader), stored_shapes(self.reader.entries)
        return inventory(self.model, self.architecture, names, shapes)

    @contextmanager
    def outside(self) -> Iterator[None]:
        """Embeddings, final norm and head as views of the files: only what is touched is read."""
        prefix = self.architecture.layers_path + "."
        names = [n for n, _ in self.model.named_parameters() if not n.startswith(prefix)]
        by_stored = {self.stored[n]: n for n in names if n in self.stored}
        for stored, tensor in self.reader.mapped(list(by_stored)):
            assign(self.model, by_stored[stored], tensor.to(self.device, self.dtype))
        self.model.tie_weights()
        try:
            yield
        finally:
            for name in names:
                assign(self.model, name, self.model.get_parameter(name).to("meta"))

    @contextmanager
    def layer(self, index: int) -> Iterator[nn.Module]:
        """The layer, filled on entry and emptied on exit."""
        layer = self.layers[index]
        prefix = self.architecture.layer_name(index)
        fill(layer, prefix, self.reader, self.stored, self.device, self.dtype)
        # Buffers are made with the skeleton, on the CPU.
        layer.to(self.device)
        try:
            yield layer
        finally:
            empty(layer)

    def commit(self, index: int, names: list[str]) -> None:
        """Write the new values over the old ones in the copy."""
        if self.output is None:
            return
        for name in names:
            self.output.write(self.stored[name], self.model.get_parameter(name))
        self.output.sync()
