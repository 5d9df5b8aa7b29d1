"""Targets of a run: a model in memory, or a checkpoint on disk.

Each decoder layer gets its weights when it is needed, in order (`walk_layers`). The table of
per-layer embeddings of Gemma 3n and small Gemma 4 is the largest matrix of the model, several times
as large as a decoder layer. On another device, or in another dtype than that of the file, the whole
table would have to be copied each time that a layer's turn comes. So a forward gets only the rows
of its own tokens.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from types import MappingProxyType
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from secateur.errors import ArchitectureError, NumericalError
from secateur.models import inventory, skeleton
from secateur.models.architecture import (
    Architecture,
    describe,
    linears_of,
    of_unknown_experts,
    refuse_shared,
    stored_linears,
)
from secateur.models.block_files import BlockFiles, StoredBlocks
from secateur.models.checkpoint import CheckpointReader, PatchedCopy

NO_BLOCKS: Mapping[str, StoredBlocks] = MappingProxyType({})


class Target(Protocol):
    """A model whose decoder layers get their weights one at a time."""

    model: Any
    architecture: Architecture
    device: torch.device
    dtype: torch.dtype

    @property
    def layers(self) -> nn.ModuleList:
        """The decoder layers; they may be empty outside `layer`."""
        ...

    def matrices(self) -> list[inventory.StoredMatrix]:
        """Every floating-point tensor of two or more dimensions, as it is stored."""
        ...

    def outside(self) -> Any:
        """A context in which everything outside the decoder layers has its weights."""
        ...

    def layer(self, index: int) -> Any:
        """A context that gives one decoder layer with its weights, on `device`."""
        ...

    def commit(
        self, index: int, names: list[str], blocks: Mapping[str, StoredBlocks] = NO_BLOCKS
    ) -> None:
        """Store the new values of some parameters of a layer, within its context.

        Args:
            index: of the layer.
            names: of the parameters.
            blocks: those of rounded matrices, by the names of their parameters.
        """
        ...

    def blocks(self, name: str) -> StoredBlocks | None:
        """The stored blocks of a parameter that is on a grid of llama.cpp; None without any."""
        ...


class ModelTarget:
    """A loaded model; its layers change in place.

    Args:
        model: a causal language model of transformers, or any module described by `architecture`.
        architecture: its description; found by `describe` when None.
    """

    def __init__(self, model: Any, architecture: Architecture | None = None) -> None:
        self.model = model
        self.architecture = architecture or describe(model)
        self.device = next(model.parameters()).device
        self.dtype = next(model.parameters()).dtype
        self.kept: dict[str, StoredBlocks] = {}

    @property
    def layers(self) -> nn.ModuleList:
        """The decoder layers."""
        return self.architecture.layers(self.model)

    def matrices(self) -> list[inventory.StoredMatrix]:
        """Every floating-point parameter of two or more dimensions, shared ones once."""
        shapes = inventory.stored_shapes(dict(self.model.named_parameters()))
        return inventory.inventory(self.model, self.architecture, {n: n for n in shapes}, shapes)

    @contextmanager
    def outside(self) -> Iterator[None]:
        """Nothing to do: a loaded model has all its weights."""
        yield

    @contextmanager
    def layer(self, index: int) -> Iterator[nn.Module]:
        """The layer itself."""
        yield self.layers[index]

    def commit(
        self, index: int, names: list[str], blocks: Mapping[str, StoredBlocks] = NO_BLOCKS
    ) -> None:
        """Keep the blocks; the layer was changed in place."""
        self.kept.update(blocks)

    def blocks(self, name: str) -> StoredBlocks | None:
        """The blocks that this run has made of a parameter."""
        return self.kept.get(name)


class CheckpointTarget:
    """A checkpoint on disk; its layers are read when needed, and written to a copy.

    Args:
        reader: the source.
        output: the copy that receives the new weights; None to only read.
        device: where layers get their weights.
        dtype: dtype of the computation; None for the dtype in `config.json`.
    """

    def __init__(
        self,
        reader: CheckpointReader,
        output: PatchedCopy | None,
        device: torch.device,
        *,
        dtype: torch.dtype | None = None,
    ) -> None:
        self.reader, self.output, self.device = reader, output, device
        self.model = skeleton.build_skeleton(reader.folder, dtype=dtype)
        self.architecture = describe(self.model)
        self.dtype = self.model.dtype
        self.stored = skeleton.stored_names(self.model, reader)
        # refuses missing tensors
        stored_linears(self.model, self.architecture, self.stored)
        skeleton.fill_buffers(self.model, reader)

    @property
    def layers(self) -> nn.ModuleList:
        """The decoder layers, on the meta device outside `layer`."""
        return self.architecture.layers(self.model)

    def matrices(self) -> list[inventory.StoredMatrix]:
        """Every floating-point tensor of two or more dimensions, as it is stored."""
        names = skeleton.model_names(self.model, self.reader)
        shapes = inventory.stored_shapes(self.reader.entries)
        return inventory.inventory(self.model, self.architecture, names, shapes)

    @contextmanager
    def outside(self) -> Iterator[None]:
        """Embeddings, final norm and head as views of the files; only the rows in use are read.

        On another device or in another dtype they are copied, but never the whole table of
        per-layer embeddings.
        """
        prefix = self.architecture.layers_path + "."
        table = per_layer_table(self.model)
        names = [
            name
            for name, parameter in self.model.named_parameters()
            if not name.startswith(prefix) and (table is None or parameter is not table.weight)
        ]
        by_stored = {self.stored[n]: n for n in names if n in self.stored}
        # views of the mapped file, unless `to` copies them
        for stored, tensor in self.reader.mapped(list(by_stored)):
            skeleton.assign(self.model, by_stored[stored], tensor.to(self.device, self.dtype))
        self.model.tie_weights()
        try:
            with self.rows_of(table):
                yield
        finally:
            for name in names:
                skeleton.assign(self.model, name, self.model.get_parameter(name).to("meta"))

    @contextmanager
    def rows_of(self, table: nn.Embedding | None) -> Iterator[None]:
        """A context in which the table of per-layer embeddings, if any, has the rows in use."""
        if table is None:
            yield
            return
        name = next(n for n, p in self.model.named_parameters() if p is table.weight)
        ((_, whole),) = self.reader.mapped([self.stored[name]])
        with _rows_in_use(table, whole, self.device, self.dtype):
            yield

    @contextmanager
    def layer(self, index: int) -> Iterator[nn.Module]:
        """The layer, filled on entry and emptied on exit."""
        layer = self.layers[index]
        prefix = self.architecture.layer_name(index)
        skeleton.fill(layer, prefix, self.reader, self.stored, self.device, self.dtype)
        # The skeleton has its buffers on the CPU.
        layer.to(self.device)
        try:
            yield layer
        finally:
            skeleton.empty(layer)

    def commit(
        self, index: int, names: list[str], blocks: Mapping[str, StoredBlocks] = NO_BLOCKS
    ) -> None:
        """Write the new values over the old ones in the copy."""
        if self.output is None:
            return
        for name in names:
            self.output.write(self.stored[name], self.model.get_parameter(name))
        self.output.sync()
        if blocks:
            own = {self.stored[name]: one for name, one in blocks.items()}
            BlockFiles(self.output.folder).write(f"layer-{index}", own)

    def blocks(self, name: str) -> StoredBlocks | None:
        """The blocks that the checkpoint has beside a parameter."""
        return self.reader.blocks(self.stored[name])


def per_layer_table(model: Any) -> nn.Embedding | None:
    """The table of per-layer embeddings; None if the model has none.

    Args:
        model: of transformers, which calls it so in every family that has one.
    """
    table = getattr(model.get_decoder(), "embed_tokens_per_layer", None)
    return table if isinstance(table, nn.Embedding) else None


@contextmanager
def _rows_in_use(
    table: nn.Embedding, whole: Tensor, device: torch.device, dtype: torch.dtype
) -> Iterator[None]:
    """A context in which every forward of a table has the rows of its tokens, and no others."""
    empty, padding = table.weight, table.padding_idx

    def take(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        rows, places = args[0].unique(return_inverse=True)  # places: of each token among the rows
        taken = whole[rows.to(whole.device)].to(device, dtype)
        table.weight = nn.Parameter(taken, requires_grad=False)
        return (places, *args[1:])

    table.padding_idx = None  # it is the number of a row of the whole; only training uses it
    try:
        with table.register_forward_pre_hook(take):
            yield
    finally:
        table.weight, table.padding_idx = empty, padding


def walk_layers(
    target: Target, numbers: Iterable[int] | None = None
) -> Iterator[tuple[int, nn.Module]]:
    """Yield each decoder layer with its weights.

    A layer has its weights until the next one is yielded. When the loop ends early, by `break` or
    by an exception, the layer is emptied as well.

    Args:
        target: the model.
        numbers: numbers of the layers to visit, in this order; None for all, from first to last.

    Yields:
        The number of a layer, and the layer.
    """
    for number in range(len(target.layers)) if numbers is None else numbers:
        with target.layer(number) as layer:
            yield number, layer


def refuse_unknown(target: Target) -> None:
    """Refuse layers whose parameters have an unknown layout.

    Raises:
        ArchitectureError: naming the module.
    """
    for path, module in target.layers.named_modules():
        for parameter in module.parameters(recurse=False):
            if of_unknown_experts(path, module, parameter):
                raise ArchitectureError(
                    f"the experts ({type(module).__name__}) are fused into one tensor, in a form "
                    "that is not known for this family",
                    where=path,
                    remedy="declare how it stores them: see CONTRIBUTING.md, 'Add a model family'",
                )
    refuse_shared(target.model, target.architecture)


def refuse_all_zero(target: Target) -> None:
    """Refuse a model without a weight to prune. Reads up to the first matrix that has one.

    Raises:
        NumericalError: every matrix of every decoder layer is zero.
    """
    count = 0
    for index, layer in walk_layers(target):
        linears = linears_of(layer, target.architecture.layer_name(index)).values()
        if any(linear.weight.any() for linear in linears):
            return
        count += len(linears)
    if count:
        raise NumericalError(
            f"all {count} matrices of the decoder are zero",
            where=target.architecture.layers_path,
            remedy="the checkpoint holds no trained weights: get it again",
        )
