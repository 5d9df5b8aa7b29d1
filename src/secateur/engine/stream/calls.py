"""Records how a model calls its decoder layers.

A recorder replaces every layer for one forward of the whole model, which stops at the last layer.
So masks, rotary tables and all other arguments of a layer are known for any family and any release
of transformers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
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
    "StandIn",
    "call_layer",
    "first_inputs",
    "in_short",
    "layer_calls",
    "replaced_layers",
]


class AfterLastLayer(BaseException):
    """The private signal that ends a recording. No model catches it: it is not an Exception."""


class OtherShapeError(Exception):
    """The private signal that a model changed the output of a stand-in."""


@dataclass(frozen=True)
class LayerCall:
    """The arguments of one decoder layer besides its hidden states.

    Attributes:
        args: positional arguments after the hidden states.
        kwargs: named arguments.
        in_tuple: whether the model expects the layer's output in a tuple.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    in_tuple: bool = False

    def to(self, device: torch.device, dtype: torch.dtype | None = None) -> LayerCall:
        """The same call with its tensors on another device, floating ones in another dtype."""

        def moved(x: Any) -> Any:
            if not isinstance(x, Tensor):
                return x
            return x.to(device, dtype if x.is_floating_point() else None)

        args, kwargs = tree_map(moved, (self.args, self.kwargs))
        return LayerCall(args, kwargs, self.in_tuple)

    def tensors(self) -> list[Tensor]:
        """All tensors among the arguments."""
        return [x for x in tree_flatten((self.args, self.kwargs))[0] if isinstance(x, Tensor)]


def call_layer(layer: Callable[..., Any], hidden: Tensor, call: LayerCall) -> Tensor:
    """Run one decoder layer: hidden states in, hidden states out."""
    out = layer(hidden, *call.args, **call.kwargs)
    return out[0] if isinstance(out, tuple) else out


class StandIn(nn.Module):
    """Replaces a decoder layer, and has all its attributes.

    Models read attributes of their layers, for example which kind of mask a layer needs.

    Args:
        layer: the layer.
        in_tuple: whether the model expects a tuple.
    """

    def __init__(self, layer: nn.Module, in_tuple: bool) -> None:
        super().__init__()
        vars(self)["stands_for"] = layer  # not as a submodule
        self.in_tuple = in_tuple

    def __getattr__(self, name: str) -> Any:
        """An attribute of the layer, if the stand-in has none of this name."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(vars(self)["stands_for"], name)

    def answer(self, hidden: Tensor) -> Any:
        """Hidden states in the form in which the layer returns them."""
        return (hidden, None) if self.in_tuple else hidden


class Recorder(StandIn):
    """Stands in for a decoder layer, records its arguments, and returns its input.

    Args:
        layer: the layer.
        last: whether the forward ends here.
        in_tuple: whether the model expects a tuple.
        shapes: collects the shapes of the hidden states in one forward; a second shape shows that
            the model took a tensor for a tuple. None to accept any.
    """

    def __init__(
        self,
        layer: nn.Module,
        last: bool,
        in_tuple: bool = False,
        shapes: set[torch.Size] | None = None,
    ) -> None:
        super().__init__(layer, in_tuple)
        self.last, self.shapes = last, shapes
        self.hidden: Tensor | None = None
        self.call: LayerCall | None = None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Record the call, and return the hidden states."""
        kwargs = dict(kwargs)
        hidden = args[0] if args else kwargs.pop("hidden_states")
        if self.shapes is not None:
            self.shapes.add(hidden.shape)
            if len(self.shapes) > 1:
                raise OtherShapeError(f"hidden states of shapes {sorted(map(tuple, self.shapes))}")
        self.hidden, self.call = hidden, LayerCall(tuple(args[1:]), kwargs, self.in_tuple)
        if self.last:
            raise AfterLastLayer
        return self.answer(hidden)


@contextmanager
def replaced_layers(layers: nn.ModuleList, stand_ins: list[nn.Module]) -> Iterator[None]:
    """A context in which other modules replace the decoder layers."""
    originals = list(layers)
    try:
        for index, stand_in in enumerate(stand_ins):
            layers[index] = stand_in
        yield
    finally:
        for index, original in enumerate(originals):
            layers[index] = original


def record(model: Any, layers: nn.ModuleList, input_ids: Tensor) -> list[Recorder]:
    """Record one forward of the model up to its last decoder layer.

    Some models expect a tensor from a layer and some a tuple. Both are tried.
    """
    faults: list[Exception] = []
    for in_tuple in (False, True):
        shapes: set[torch.Size] = set()
        last = len(layers) - 1
        recorders = [Recorder(x, i == last, in_tuple, shapes) for i, x in enumerate(layers)]
        with torch.no_grad(), replaced_layers(layers, list(recorders)):
            try:
                model(input_ids=input_ids, use_cache=False)
            except AfterLastLayer:
                if all(recorder.call is not None for recorder in recorders):
                    return recorders
            except Exception as fault:
                faults.append(fault)
    raise ArchitectureError(
        f"{type(model).__name__} did not call its {len(layers)} decoder layers in a plain "
        f"forward{f' ({in_short(faults[0])})' if faults else ''}",
        remedy="this model is not a plain decoder; it cannot be pruned layer by layer",
    ) from (faults[0] if faults else None)


def in_short(fault: Exception) -> str:
    """An exception as one line of text."""
    lines = str(fault).strip().splitlines()
    return f"{type(fault).__name__}: {lines[0]}" if lines else type(fault).__name__


def first_inputs(model: Any, layers: nn.ModuleList, input_ids: Tensor) -> Tensor:
    """Return the first decoder layer's input for token ids: [batch, sequence, hidden]."""
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
