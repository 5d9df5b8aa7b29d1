"""Windows that pass the decoder layers of a model from which layers or sub-blocks are left out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from secateur.engine.choose.depth_space import ATTENTION, FFN, WHOLE
from secateur.engine.stream.calls import first_inputs, layer_calls, replaced_layers
from secateur.engine.stream.gradients import injected
from secateur.engine.stream.targets import Target
from secateur.errors import ArchitectureError
from secateur.precision import fast_matmuls

__all__ = ["STATES_BYTES", "Stream", "parameters_of", "parts_of"]

STATES_BYTES = 1 << 30
"""Hidden states that wait in memory at once; beyond it windows go in several passes."""

_NAMES = {ATTENTION: "attention", FFN: "feed-forward"}


def parts_of(layer: nn.Module) -> dict[int, list[nn.Module]]:
    """The modules of a decoder layer that make up its attention and its feed-forward sub-block.

    Every child with a matrix belongs to one: to attention if its name or class says so. Norms
    belong to none.
    """
    parts: dict[int, list[nn.Module]] = {ATTENTION: [], FFN: []}
    for name, child in layer.named_children():
        if any(p.ndim > 1 for p in child.parameters()):
            said = f"{name} {type(child).__name__}".lower()
            parts[ATTENTION if "attn" in said or "attention" in said else FFN].append(child)
    return parts


def parameters_of(layer: nn.Module) -> dict[int, int]:
    """How many parameters each sub-block of a layer has."""
    return {
        part: sum(p.numel() for module in modules for p in module.parameters())
        for part, modules in parts_of(layer).items()
    }


class Stream:
    """Passes windows through layers of which sub-blocks can be missing.

    A sub-block that is left out adds nothing to the residual stream: its modules return zeros.
    That this makes the layer the identity when both are left out is tried once for each layer
    that loses one, so a family in which more than the sub-blocks writes to the stream (a norm
    with a bias behind them, or a norm on the stream itself) is refused.

    Args:
        target: the model, dense.
        windows: tokens [samples, sequence_length]; one window passes at a time.
    """

    def __init__(self, target: Target, windows: Tensor) -> None:
        self.target, self.windows = target, windows
        with target.outside():
            ids = [window[None].to(target.device) for window in windows[[0, -1]]]
            calls = layer_calls(target.model, target.layers, ids)
        self.calls = [call.to(target.device) for call in calls]
        self.outputs: dict[tuple[int, int], list[int]] = {}

    def first(self, rows: Sequence[int]) -> list[Tensor]:
        """What the first layer receives, for some windows."""
        model, layers, device = self.target.model, self.target.layers, self.target.device
        with self.target.outside():
            return [first_inputs(model, layers, self.windows[r][None].to(device)) for r in rows]

    def parts(self, rows: Sequence[int], copies: int) -> Iterator[list[int]]:
        """The windows in parts of which so many copies of hidden states fit in memory."""
        width = self.first(rows[:1])[0]
        size = max(1, STATES_BYTES // (copies * width.numel() * width.element_size()))
        for start in range(0, len(rows), size):
            yield list(rows[start : start + size])

    def run(self, index: int, layer: nn.Module, hidden: Tensor, kept: int) -> Tensor:
        """Run a layer of which only some sub-blocks are kept."""
        if kept == 0:
            return hidden
        if kept == WHOLE:
            return self.whole(index, layer, hidden)
        if (index, ATTENTION) not in self.outputs:
            self.learn(index, layer, hidden)
        with self.silenced(index, layer, WHOLE & ~kept):
            return self.whole(index, layer, hidden)

    def whole(self, index: int, layer: nn.Module, hidden: Tensor) -> Tensor:
        """Run a layer as it is."""
        call = self.calls[index]
        with fast_matmuls(self.target.device):
            out = layer(hidden, *call.args, **call.kwargs)
        return out[0] if isinstance(out, tuple) else out

    def learn(self, index: int, layer: nn.Module, hidden: Tensor) -> None:
        """See what the sub-blocks of a layer return, and that the layer adds nothing without them.

        Raises:
            ArchitectureError: it does.
        """
        returned: dict[nn.Module, int] = {}

        def note(module: nn.Module, args: Any, out: Any) -> None:
            returned[module] = len(out) if isinstance(out, tuple) else 0

        parts = parts_of(layer)
        handles = [m.register_forward_hook(note) for ms in parts.values() for m in ms]
        try:
            self.whole(index, layer, hidden)
        finally:
            for handle in handles:
                handle.remove()
        for part, modules in parts.items():
            self.outputs[index, part] = [returned.get(module, 0) for module in modules]
        with self.silenced(index, layer, WHOLE):
            if not torch.equal(self.whole(index, layer, hidden), hidden):
                raise ArchitectureError(
                    f"without {' and '.join(_NAMES.values())} a {type(layer).__name__} still "
                    "changes its input, so sub-blocks cannot be dropped one by one",
                    where=self.target.architecture.layer_name(index),
                    remedy="drop whole layers: units: layers",
                )

    @contextmanager
    def silenced(self, index: int, layer: nn.Module, missing: int) -> Iterator[None]:
        """A context in which some sub-blocks of a layer return zeros.

        Only `forward` is replaced, because layers read marks off their attention.
        """
        parts = parts_of(layer)
        chosen = [
            (module, outputs)
            for part in (ATTENTION, FFN)
            if part & missing
            for module, outputs in zip(parts[part], self.outputs[index, part], strict=True)
        ]
        before = [vars(module).get("forward") for module, _ in chosen]
        for module, outputs in chosen:
            vars(module)["forward"] = nothing(outputs)
        try:
            yield
        finally:
            for (module, _), forward in zip(chosen, before, strict=True):
                del vars(module)["forward"]
                if forward is not None:
                    vars(module)["forward"] = forward

    def logits(self, row: int, hidden: Tensor) -> Tensor:
        """What the model makes of the last layer's output: logits [sequence, vocabulary]."""
        model, layers = self.target.model, self.target.layers
        ids = self.windows[row][None].to(self.target.device)
        stand_ins = injected(layers, self.calls, hidden)
        with replaced_layers(layers, stand_ins), fast_matmuls(self.target.device):
            found: Tensor = model(input_ids=ids, use_cache=False).logits
        return found[0]


def nothing(outputs: int) -> Any:
    """A forward that returns zeros in the shape of its input, in a tuple of so many (0: none)."""

    def forward(*args: Any, **kwargs: Any) -> Any:
        zeros = torch.zeros_like(args[0] if args else kwargs["hidden_states"])
        return (zeros, *[None] * (outputs - 1)) if outputs else zeros

    return forward
