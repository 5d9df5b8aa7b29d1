"""The edit of each parameter when units are cut.

Where an RMSNorm runs over a dimension that is cut, its mean square is over fewer values.

Residual stream: removed channels are zero in the norm, since nothing writes to them. So √(mean x²
over D) = √(D'/D) · √(mean x² over D'); the weights are multiplied by √(D/D'), and ε by D/D'. The
cut model then computes the same as the masked one.

A configuration has one ε. Norms of queries and keys get the larger one too, though nothing is cut
that they run over. So these queries and keys are multiplied by √(D/D') as well: x / √(mean x² + ε)
stays as it is when x² and ε grow alike. Norms within linear attention read what no weight scales;
those of Qwen3-Next and Qwen3.5 keep the larger ε.

Heads (OLMo 2 norms queries and keys over all of them): removed heads are not zero in the norm.
Where they are as large as the kept ones, mean x² over D and over D' are equal, so the weights do
not change. With √(D/D') on queries and keys, attention logits would be D/D' times as large. With
half of the heads cut in three random models, the outputs are off by 0.62 to 0.70 of their norm with
that factor and by 0.15 to 0.25 without (`tests/structured/test_surgery_of_families.py`).

A LayerNorm also subtracts the mean, and runs over the kept channels without a change.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from math import sqrt
from typing import Any

import torch
from torch import Tensor, nn

from secateur.errors import ArchitectureError
from secateur.models.architecture import Architecture, Axes, Couplings
from secateur.models.skeleton import parameters_of, stored_buffers
from secateur.structured.cut import UNITS, Cut, Sizes, couplings_of, find


@dataclass(frozen=True)
class TensorEdit:
    """How a parameter of the cut model is made from one of the uncut model.

    Attributes:
        source: name of the parameter in the uncut model.
        kept: for each stored axis the kept indices; None for all. Of the neurons of experts they
            are [experts, neurons], those of each expert.
        shape: of the result.
        interleaved: whether gate and up of experts take turns along the axis of neurons; otherwise
            all of gate come first.
        scale: factor of the result, applied while `offset` is added.
        offset: the number that the parameter's module adds to it.
        routes: for a table of the experts of each token, the numbers of those that stay.
        value: the result itself, where it is not made from the parameter's values.
    """

    source: str
    kept: tuple[Tensor | None, ...]
    shape: tuple[int, ...]
    scale: float = 1.0
    offset: float = 0.0
    interleaved: bool = False
    routes: Tensor | None = None
    value: Tensor | None = None

    @classmethod
    def copy(cls, source: str, shape: tuple[int, ...]) -> TensorEdit:
        """An edit that changes nothing."""
        return cls(source, (None,) * len(shape), shape)

    def keeping(self, axis: int, entries: Tensor) -> TensorEdit:
        """The edit that keeps only these entries of an axis."""
        kept, shape = [*self.kept], [*self.shape]
        kept[axis], shape[axis] = entries, len(entries)
        return replace(self, kept=tuple(kept), shape=tuple(shape))

    def __call__(self, parameter: Tensor) -> Tensor:
        """The new values, in their own memory unless nothing changes."""
        if self.value is not None:
            return self.value
        for axis, index in enumerate(self.kept):
            if index is not None and index.ndim == 1:
                parameter = parameter.index_select(axis, index.to(parameter.device))
            elif index is not None:
                parameter = self._of_each(parameter, axis, index)
        if self.scale != 1:
            # A norm that multiplies by 1 + w (Gemma) stores w: the factor is one of 1 + w.
            scaled = (parameter.float() + self.offset) * self.scale - self.offset
            parameter = scaled.to(parameter.dtype)
        return parameter if self.routes is None else rerouted(parameter, self.routes)

    def _of_each(self, experts: Tensor, axis: int, neurons: Tensor) -> Tensor:
        """The values of the neurons [experts, neurons] that each expert keeps along an axis."""
        parts = self.shape[axis] // neurons.shape[1]  # 2 where gate and up are in one tensor
        if self.interleaved:
            rows = _spread(neurons.flatten(), parts).view(len(neurons), -1)
        else:
            count = experts.shape[axis] // parts
            rows = torch.cat([neurons + count * part for part in range(parts)], dim=1)
        chosen = zip(experts, rows.to(experts.device), strict=True)
        return torch.stack([one.index_select(axis - 1, own) for one, own in chosen])


def rerouted(table: Tensor, kept: Tensor) -> Tensor:
    """The experts of each token [tokens, chosen] by their new numbers.

    Tokens of an expert that is gone go to those that stay, in turn; no token has one twice.

    Example:
        >>> import torch
        >>> from secateur.structured.edits import rerouted
        >>> rerouted(torch.tensor([[0, 3], [1, 3], [2, 1]]), torch.tensor([0, 2, 3])).tolist()
        [[0, 2], [1, 2], [1, 0]]
    """
    numbers = table.new_full((max(int(table.max()), int(kept.max())) + 1,), -1)
    numbers[kept] = torch.arange(len(kept), dtype=table.dtype)
    found = numbers[table.long()]
    for place in range(table.shape[1]):
        other = (torch.arange(len(table), dtype=table.dtype) + place) % len(kept)
        for _ in range(table.shape[1]):
            other = torch.where((found == other[:, None]).any(1), (other + 1) % len(kept), other)
        found[:, place] = torch.where(found[:, place] < 0, other, found[:, place])
    return found


@dataclass(frozen=True)
class LayerCut:
    """The units of one decoder layer to keep.

    Attributes:
        index: of the layer in the uncut model.
        kept: indices by kind; a kind without an entry is kept whole. No groups: no attention
            sub-block; no neurons: no FFN sub-block. Neurons of experts are [experts, neurons],
            those of each expert of the uncut layer.
    """

    index: int
    kept: Mapping[str, Tensor]


_READ_BY = {
    "q_proj": ("q_norm", "query_layernorm", "qk_norm"),
    "k_proj": ("k_norm", "key_layernorm", "qk_norm"),
}
"""The modules that norm what a linear of the attention computes, by the name of the linear."""

_UNCUT = LayerCut(-1, {})
"""For parameters outside the layers."""


def layer_cuts(cut: Cut, sizes: Sizes) -> list[LayerCut]:
    """The kept units of each kept layer, in order.

    Args:
        cut: checked.
        sizes: of the uncut model.
    """

    def units(layer: int) -> Iterator[tuple[str, Tensor]]:
        for kind in UNITS:
            kept: Any = getattr(cut, kind).get(layer)
            if kept is not None:
                found = torch.tensor(kept, dtype=torch.long)
                if not len(found) or found.shape[-1] < getattr(sizes, kind)[layer]:
                    yield kind, found

    indices = range(sizes.layers) if cut.layers is None else cut.layers
    return [LayerCut(i, dict(units(i))) for i in indices]


@dataclass(frozen=True)
class Blueprint:
    """What a cut leaves, before there is a model that has these sizes.

    Attributes:
        uncut: the uncut model, with experts as transformers stores them.
        architecture: of the uncut model.
        sizes: of the uncut model.
        hidden: the kept channels of the residual stream; None = all.
        layers: for each kept layer, the units it keeps.
        predicting: experts that stay in layers that predict further tokens, as in `Cut`.
    """

    uncut: Any
    architecture: Architecture
    sizes: Sizes
    hidden: Tensor | None
    layers: list[LayerCut]
    predicting: Mapping[int, Tensor]

    @property
    def channels(self) -> int:
        """Remaining channels of the residual stream."""
        return self.sizes.hidden if self.hidden is None else len(self.hidden)

    @property
    def heads_per_group(self) -> int:
        """Remaining query heads of each KV group."""
        for layer in self.layers:
            if (queries := layer.kept.get("queries")) is not None:
                return len(queries) // self.sizes.groups[layer.index]
        return self.sizes.heads_per_group

    def count(self, layer: LayerCut, kind: str) -> int:
        """How many units of a kind a layer keeps."""
        kept = layer.kept.get(kind)
        return getattr(self.sizes, kind)[layer.index] if kept is None else kept.shape[-1]


def edits_of(blueprint: Blueprint) -> dict[str, TensorEdit]:
    """The edit of every parameter of the cut model, by its name there.

    Raises:
        ArchitectureError: a parameter that may have to be cut is not declared.
    """
    architecture = blueprint.architecture
    couplings = architecture.couplings or Couplings({}, {})  # without them only layers are cut
    prefix = architecture.layers_path + "."
    there = tensors_of(blueprint.uncut)
    # Where a linear lies between embedding and stream (OPT), the embedding keeps its own width.
    projected = any(name.endswith("project_in.weight") for name in there)
    embedding = "-" if projected else "hidden"
    outside = {
        name: tuple(embedding if axis == "embedding" else axis for axis in axes)
        for name, axes in couplings.outside.items()
    }
    found = {
        name: _of_layers(blueprint, _edit(blueprint, name, name, outside, _UNCUT), outside)
        for name in there
        if not name.startswith(prefix)
    }
    for new, layer in enumerate(blueprint.layers):
        start = f"{prefix}{layer.index}."
        gone = tuple(f"{module}." for module in gone_of(couplings, layer))
        for name in there:
            inner = name.removeprefix(start)
            if name.startswith(start) and not inner.startswith(gone):
                edit = _edit(blueprint, name, inner, couplings.layer, layer)
                found[f"{prefix}{new}.{inner}"] = edit
    return found


def _of_layers(blueprint: Blueprint, edit: TensorEdit, declared: Axes) -> TensorEdit:
    """The edit without the entries of removed layers, of a parameter outside the layers."""
    axes = declared.get(edit.source.rpartition(".")[0], ())
    kept, count = [layer.index for layer in blueprint.layers], blueprint.sizes.layers
    if "layers" not in axes or len(kept) == count:
        return edit
    axis = axes.index("layers")
    return edit.keeping(axis, _spread(torch.tensor(kept), edit.shape[axis] // count))


def _edit(
    blueprint: Blueprint, name: str, inner: str, declared: Axes, layer: LayerCut
) -> TensorEdit:
    """The edit of one parameter; `inner` is its name within the layer.

    Raises:
        ArchitectureError: the parameter is not declared, and may have to be cut.
    """
    stream, sizes = blueprint.hidden, blueprint.sizes
    owner, _, leaf = name.rpartition(".")
    module = blueprint.uncut.get_submodule(owner)
    parameter: Tensor = getattr(module, leaf)
    axes = declared.get(inner) or declared.get(inner.rpartition(".")[0])
    if axes is None:
        cut = (stream, *map(layer.kept.get, ("groups", "queries", "neurons")))
        if any(x is not None for x in cut):
            raise ArchitectureError(
                "the dimensions of this parameter are not declared, so it cannot be cut",
                where=name,
                remedy="declare it in the couplings of the model's family",
            )
        return TensorEdit.copy(name, tuple(parameter.shape))
    if parameter.ndim == 1:  # a bias, or a norm, has the first axis of its module's weight
        axes = axes[:1]
    elif parameter.ndim == 2 and type(module).__name__ == "Conv1D":  # which stores [in, out]
        axes = axes[::-1]
    kept = tuple(
        _kept_along(axis, size, sizes, layer, stream)
        for axis, size in zip(axes, parameter.shape, strict=True)
    )
    if axes[-1] == "routes":
        return TensorEdit(name, kept, tuple(parameter.shape), routes=layer.kept.get("experts"))
    neurons = sizes.expert_neurons[layer.index]
    shape = tuple(
        n if k is None else len(k) if k.ndim == 1 else n // neurons * k.shape[1]
        for n, k in zip(parameter.shape, kept, strict=True)
    )
    scale, offset = 1.0, 0.0
    if kept[0] is not None and _is_rms_norm(module):
        # Removed channels were zero in the norm: √(D/D'). Removed heads were not.
        scale = sqrt(parameter.shape[0] / len(kept[0])) if axes[0] == "hidden" else 1.0
        offset = couplings_of(blueprint.architecture).norm_offset
    attention, _, linear = owner.rpartition(".")
    norms = (find(blueprint.uncut, f"{attention}.{norm}") for norm in _READ_BY.get(linear, ()))
    normed = any(norm is not None and _is_rms_norm(norm) for norm in norms)
    if axes[0] in ("queries", "keys") and stream is not None and normed:
        # ε has grown by D/D' in all norms, so what these norms read grows by its root.
        scale *= sqrt(sizes.hidden / len(stream))
    experts = blueprint.architecture.experts
    interleaved = experts is not None and experts.layout.interleaved
    return TensorEdit(name, kept, shape, scale, offset, interleaved)


def tensors_of(model: Any) -> dict[str, Tensor]:
    """Parameters by name, as `parameters_of`, and buffers that checkpoints store."""
    return parameters_of(model) | stored_buffers(model)


def gone_of(couplings: Couplings, layer: LayerCut) -> tuple[str, ...]:
    """Modules of a layer that are removed with its sub-blocks."""
    gone: tuple[str, ...] = ()
    if (groups := layer.kept.get("groups")) is not None and not len(groups):
        gone += (couplings.attention, *couplings.attention_norms)
    if (neurons := layer.kept.get("neurons")) is not None and not len(neurons):
        gone += (*couplings.ffn, *couplings.ffn_norms)
    return gone


def _is_rms_norm(module: nn.Module) -> bool:
    """Whether this is a norm by the root of the mean square."""
    return any(name in type(module).__name__ for name in ("RMSNorm", "L2Norm"))


def _kept_along(
    axis: str, size: int, sizes: Sizes, layer: LayerCut, stream: Tensor | None
) -> Tensor | None:
    """Indices kept along an axis of a stored parameter; None = all.

    Args:
        axis: its name, or several joined by `+`.
        size: entries along it.
        sizes: of the uncut model.
        layer: the kept units of the layer.
        stream: channels of the residual stream that are kept.
    """
    each, width = sizes.heads_per_group, sizes.head_dim
    widths = {  # how many consecutive entries a KV group has along each axis of heads
        "queries": each * width,
        # one entry for each query head
        "heads": each,
        "pairs": 2 * each * width,
        "keys": width,
        "triples": (each + 2) * width,
    }
    groups, queries, segments = layer.kept.get("groups"), layer.kept.get("queries"), axis.split("+")
    if len(segments) > 1:
        # Parts one behind the other in one matrix (queries, keys, values): each is cut by itself,
        # and its indices begin where it begins.
        full = [
            sizes.groups[layer.index] * widths[x] if x in widths else getattr(sizes, x)[layer.index]
            for x in segments
        ]
        parts = [
            _kept_along(x, n, sizes, layer, stream) for x, n in zip(segments, full, strict=True)
        ]
        if all(part is None for part in parts):
            return None
        # Where each part begins.
        starts = [sum(full[:n]) for n in range(len(full))]
        within = [torch.arange(n) if x is None else x for x, n in zip(parts, full, strict=True)]
        return torch.cat([x + start for x, start in zip(within, starts, strict=True)])
    if axis == "parts":  # of latent attention, whose heads are all groups
        kept = groups if queries is None else queries
        return None if kept is None else _spread(kept, size // sizes.groups[layer.index])
    if axis in widths:
        if queries is not None:
            return _along_queries(axis, sizes, queries)
        return None if groups is None else _spread(groups, widths[axis])
    kept, experts = layer.kept.get(axis), layer.kept.get("experts")
    if axis == "expert_neurons" and kept is not None and experts is not None:
        return kept[experts]
    return stream if axis == "hidden" else kept


def _along_queries(axis: str, sizes: Sizes, kept: Tensor) -> Tensor | None:
    """Kept indices along an axis of heads, if query heads are removed; None = all."""
    each, size = sizes.heads_per_group, sizes.head_dim
    widths = {"heads": 1, "queries": size, "pairs": 2 * size}
    if axis != "triples":
        return _spread(kept, widths[axis]) if axis in widths else None
    # A group is stored as its query heads, then its key, then its value: each + 2 heads.
    parts = []
    for group in range(int(kept[-1]) // each + 1):  # its query heads, and its key and value
        own = kept[kept // each == group] - group * each
        heads = torch.cat([own, torch.tensor([each, each + 1])])
        parts.append(_spread(heads + group * (each + 2), size))
    return torch.cat(parts)


def _spread(units: Tensor, width: int) -> Tensor:
    """Indices of all entries of units of `width` consecutive ones."""
    # [units, width], read row by row.
    entries = units[:, None] * width + torch.arange(width)
    return entries.flatten()
