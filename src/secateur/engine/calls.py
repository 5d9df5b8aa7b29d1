"""How a model calls its decoder layers, recorded instead of guessed.

Every layer is replaced by a recorder for one forward of the whole model, which is stopped after
the last layer. So masks, rotary tables and whatever else a release of transformers hands to a
layer arrive as they are, layer by layer, for any family.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map

from secateur.errors import ArchitectureError

__all__ = [
    "LayerCall",
    "Recorder",
    "call_layer",
    "first_inputs",
    "layer_calls",
    "replaced_layers",
]


class AfterLastLayer(BaseException):
    """The private signal that ends a recording; not an Exception, so that no model catches it."""


@dataclass(frozen=True)
class LayerCall:
    """The arguments of one decoder layer besides its hidden states."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def to(self, device: torch.device, dtype: torch.dtype | None = None) -> LayerCall:
        """The same call with its tensors on another device, floating ones in another dtype."""

        def moved(x: Any) -> Any:
            if not isinstance(x, Tensor):
                return x
            return x.to(device, dtype if x.is_floating_point() else None)

        return LayerCall(*tree_map(moved, (self.args, self.kwargs)))

    def tensors(self) -> list[Tensor]:
        """All tensors among the arguments."""
        return [x for x in tree_flatten((self.args, self.kwargs))[0] if isinstance(x, Tensor)]


def call_layer(layer: nn.Module, hidden: Tensor, call: LayerCall) -> Tensor:
    """Run one decoder layer: hidden states in, hidden states out."""
    out = layer(hidden, *call.args, **call.kwargs)
    return out[0] if isinstance(out, tuple) else out


class Recorder(nn.Module):
    """Stands in for a decoder layer, keeps how it was called, and passes its input on."""

    def __init__(self, layer: nn.Module, last: bool) -> None:
        super().__init__()
        # Models read such marks off their layers (for example which kind of mask a layer wants).
        for mark in ("layer_type", "attention_type", "is_sliding", "layer_idx"):
            if hasattr(layer, mark):
                setattr(self, mark, getattr(layer, mark))
        self.last = last
        self.hidden: Tensor | None = None
        self.call: LayerCall | None = None

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Record and pass on."""
        kwargs = dict(kwargs)
        hidden = args[0] if args else kwargs.pop("hidden_states")
        self.hidden, self.call = hidden, LayerCall(tuple(args[1:]), kwargs)
        if self.last:
            raise AfterLastLayer
        return hidden


@contextmanager
def replaced_layers(layers: nn.ModuleList, stand_ins: list[nn.Module]) -> Iterator[None]:
    """Put other modules in place of the decoder layers for a while."""
    originals = list(layers)
    try:
        for index, stand_in in enumerate(stand_ins):
            layers[index] = stand_in
        yield
    finally:
        for index, original in enumerate(originals):
            layers[index] = original


def record(model: Any, layers: nn.ModuleList, input_ids: Tensor) -> list[Recorder]:
    """Record one forward of the model up to its last decoder layer."""
    recorders = [Recorder(layer, i == len(layers) - 1) for i, layer in enumerate(layers)]
    with torch.no_grad(), replaced_layers(layers, list(recorders)):
        try:
            model(input_ids=input_ids, use_cache=False)
        except AfterLastLayer:
            return recorders
    raise ArchitectureError(
        f"{type(model).__name__} did not call its {len(layers)} decoder layers in a plain forward",
        remedy="this model is not a plain decoder; it cannot be pruned layer by layer",
    )


def first_inputs(model: Any, layers: nn.ModuleList, input_ids: Tensor) -> Tensor:
    """What the first decoder layer receives for a batch of token ids: [batch, sequence, hidden]."""
    hidden = record(model, layers, input_ids)[0].hidden
    assert hidden is not None
    return hidden


def layer_calls(model: Any, layers: nn.ModuleList, batches: list[Tensor]) -> list[LayerCall]:
    """How each layer is called, for each of several batches of equal shape.

    Returns:
        One call per layer, the same for all batches of this shape.

    Raises:
        ArchitectureError: the calls depend on the tokens, so they cannot be shared.
    """
    recorded = [[r.call for r in record(model, layers, batch)] for batch in batches]
    for other in recorded[1:]:
        for index, (one, two) in enumerate(zip(recorded[0], other, strict=True)):
            pairs = zip(one.tensors(), two.tensors(), strict=True)  # type: ignore[union-attr]
            if not all(torch.equal(a, b) for a, b in pairs):
                raise ArchitectureError(
                    f"decoder layer {index} of {type(model).__name__} is handed values that depend "
                    "on the tokens besides its hidden states",
                    remedy="this family cannot be pruned layer by layer yet",
                )
    return recorded[0]  # type: ignore[return-value]
