"""Which parts of a model can be pruned: its decoder layers, their linears, and who shares an input.

A `Family` is data: the path to the decoder layers, and the linears of a layer grouped by the input
they share, in the order they run. Families the library does not know are described by looking: the
layers are the longest list of modules that hold linears, and the groups are found by running one.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from secateur.errors import ArchitectureError
from secateur.models.couplings import Couplings
from secateur.registry import Registry

__all__ = ["Architecture", "Family", "Linear", "describe", "families", "linears_of"]

Groups = tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class Family:
    """A model family, declared.

    Attributes:
        model_types: `model_type` values of transformers configurations that belong to it.
        layers: the path of the list of decoder layers within the causal language model.
        groups: names of the linears within a decoder layer; those that share an input together.
        writers: linears whose output is added to the residual stream as it is. Empty where a
            norm comes between, or where it is not known.
        couplings: what has to be cut together; None where only whole layers can be cut.
    """

    model_types: tuple[str, ...]
    layers: str
    groups: Groups
    writers: tuple[str, ...] = ()
    couplings: Couplings | None = None


families: Registry[Family] = Registry("family", "secateur.models.families")

SPLIT_ATTENTION_GATED_FFN: Groups = (
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    ("self_attn.o_proj",),
    ("mlp.gate_proj", "mlp.up_proj"),
    ("mlp.down_proj",),
)
"""The layout Llama made common: separate projections, gated feed-forward."""

PRE_NORM_WRITERS = ("self_attn.o_proj", "mlp.down_proj")
"""The linears of that layout that write to the residual stream, where norms come before only."""


@dataclass
class Linear:
    """One prunable matrix, always seen as [out, in].

    Attributes:
        name: full name within the model, without `.weight`.
        module: nn.Linear, or transformers' Conv1D, which stores the transpose.
    """

    name: str
    module: nn.Module

    @property
    def transposed(self) -> bool:
        """Whether the module stores [in, out]."""
        return not isinstance(self.module, nn.Linear)

    @property
    def weight(self) -> Tensor:
        """The weight as a view [out, in]."""
        stored: Tensor = self.module.get_parameter("weight").detach()
        return stored.t() if self.transposed else stored

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        out, columns = self.weight.shape
        return int(out), int(columns)

    @torch.no_grad()
    def assign(self, weight: Tensor) -> None:
        """Overwrite the weight with values [out, in], cast to its dtype."""
        self.weight.copy_(weight)


@dataclass(frozen=True)
class Architecture:
    """A model, described.

    Attributes:
        family: name of the declared family, or `generic`.
        layers_path: path of the list of decoder layers.
        groups: linears by shared input, or None where they have to be found by running a layer.
        writers: linears whose output is added to the residual stream as it is, as far as known.
        couplings: what has to be cut together, where it is declared.
    """

    family: str
    layers_path: str
    groups: Groups | None
    writers: tuple[str, ...] = ()
    couplings: Couplings | None = None

    def layers(self, model: nn.Module) -> nn.ModuleList:
        """The decoder layers."""
        return model.get_submodule(self.layers_path)  # type: ignore[return-value]

    def layer_name(self, index: int) -> str:
        """The full name of a decoder layer."""
        return f"{self.layers_path}.{index}"


def linears_of(layer: nn.Module, layer_name: str) -> dict[str, Linear]:
    """All prunable matrices of a decoder layer, by their name within the layer."""
    from transformers.pytorch_utils import Conv1D

    return {
        name: Linear(f"{layer_name}.{name}", module)
        for name, module in layer.named_modules()
        if isinstance(module, (nn.Linear, Conv1D))
    }


def describe(model: Any) -> Architecture:
    """Describe a causal language model.

    Raises:
        ArchitectureError: no list of decoder layers with linears was found.
    """
    config = getattr(model, "config", None)
    model_type = getattr(config, "base_model_type", None) or getattr(config, "model_type", None)
    for name in families:
        family = families[name]
        if model_type in family.model_types:
            return Architecture(
                name, family.layers, family.groups, family.writers, family.couplings
            )
    candidates = sorted(candidate_layers(model), key=lambda c: c[1], reverse=True)
    if not candidates:
        raise ArchitectureError(
            f"{type(model).__name__} has no list of decoder layers made of linears",
            remedy="declare its family: see CONTRIBUTING.md, 'Add a model family'",
        )
    return Architecture("generic", candidates[0][0], None)


def candidate_layers(model: nn.Module) -> Iterator[tuple[str, int]]:
    """Lists of like modules that hold linears: (path, number of weights in linears)."""
    for path, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len({type(child) for child in module}) == 1:
            weights = sum(
                linear.module.weight.numel()  # type: ignore[operator]
                for child in module
                for linear in linears_of(child, path).values()
                if linear.name != f"{path}."
            )
            if weights:
                yield path, weights
