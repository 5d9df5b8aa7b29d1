"""The two ends of a model: the input of its first decoder layer, and the logits after its last.

The caller runs the layers in between: all layers, fewer layers, or layers with other weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from secateur.engine.stream.calls import (
    LayerCall,
    StandIn,
    call_layer,
    first_inputs,
    layer_calls,
    replaced_layers,
)
from secateur.engine.stream.targets import Target
from secateur.precision import fast_matmuls

__all__ = ["STATES_BYTES", "ModelEnds"]

STATES_BYTES = 1 << 30
"""Maximum size of the hidden states of one part in `ModelEnds.parts`."""


class Injector(StandIn):
    """Replaces a decoder layer and returns the given hidden states for any input.

    Args:
        layer: the layer.
        call: how the model calls it.
        hidden: the hidden states to return; None for the layer's own input.
    """

    def __init__(self, layer: nn.Module, call: LayerCall, hidden: Tensor | None) -> None:
        super().__init__(layer, call.in_tuple)
        self.hidden = hidden

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return the given hidden states."""
        if self.hidden is not None:
            return self.answer(self.hidden)
        return self.answer(args[0] if args else kwargs["hidden_states"])


class ModelEnds:
    """Embeds windows, records how the layers are called, and turns hidden states into logits.

    Args:
        target: the model.
        windows: token ids [samples, sequence_length].
    """

    def __init__(self, target: Target, windows: Tensor) -> None:
        self.target, self.windows = target, windows
        self.recorded: dict[int, list[LayerCall]] = {}

    def calls(self, size: int = 1) -> list[LayerCall]:
        """How the model calls each layer for a batch of `size` windows.

        Raises:
            ArchitectureError: the calls depend on the tokens, so windows cannot share them.
        """
        if size not in self.recorded:
            total, device = len(self.windows), self.target.device
            ends = slice(0, size), slice(total - size, total)
            with self.target.outside():
                ids = [self.windows[rows].to(device) for rows in ends]
                calls = layer_calls(self.target.model, self.target.layers, ids)
            self.recorded[size] = [call.to(device) for call in calls]
        return self.recorded[size]

    def embed(self, batches: Sequence[slice]) -> Iterator[Tensor]:
        """Yield the inputs of the first layer, one batch of windows at a time.

        Yields:
            Hidden states [windows, sequence_length, hidden_size].
        """
        model, layers, device = self.target.model, self.target.layers, self.target.device
        with self.target.outside():
            for rows in batches:
                yield first_inputs(model, layers, self.windows[rows].to(device))

    def embedded(self, rows: Sequence[int]) -> list[Tensor]:
        """The inputs of the first layer for some windows, one tensor for each."""
        return list(self.embed([slice(row, row + 1) for row in rows]))

    def parts(self, rows: Sequence[int], copies: int) -> Iterator[list[int]]:
        """Split windows into parts whose hidden states fit into `STATES_BYTES`.

        Args:
            rows: numbers of windows.
            copies: number of hidden states of each window in memory at once.
        """
        (hidden,) = self.embedded(rows[:1])
        size = max(1, STATES_BYTES // (copies * hidden.numel() * hidden.element_size()))
        for start in range(0, len(rows), size):
            yield list(rows[start : start + size])

    def run(self, number: int, layer: Callable[..., Any], hidden: Tensor) -> Tensor:
        """Pass the hidden states of one window through a layer, with fast matmuls.

        Args:
            number: number of the layer.
            layer: the layer, or a function with the same arguments.
            hidden: [1, sequence_length, hidden_size].
        """
        with fast_matmuls(self.target.device):
            return call_layer(layer, hidden, self.calls()[number])

    @contextmanager
    def outside(self) -> Iterator[None]:
        """A context in which everything outside the layers has its weights, for `head`."""
        self.calls()  # contexts of a target do not nest, so the calls are recorded before
        with self.target.outside():
            yield

    def head(self, row: int, hidden: Tensor) -> Tensor:
        """Return the logits for the last layer's output for one window.

        Call this only within `outside()`.

        Args:
            row: number of the window.
            hidden: [1, sequence_length, hidden_size].

        Returns:
            [sequence_length, vocabulary], in the dtype of the model.
        """
        ids = self.windows[row : row + 1].to(self.target.device)
        with self.returning(hidden):
            logits: Tensor = self.target.model(input_ids=ids, use_cache=False).logits
        return logits[0]

    @contextmanager
    def returning(self, hidden: Tensor | None) -> Iterator[None]:
        """A context in which every decoder layer returns these hidden states.

        So the model computes what follows its last layer. Use it only within `outside()`.

        Args:
            hidden: [windows, sequence_length, hidden_size]; None lets the layers return their own
                inputs.
        """
        layers, calls = self.target.layers, self.calls()
        injectors: list[nn.Module] = [
            Injector(layer, call, hidden) for layer, call in zip(layers, calls, strict=True)
        ]
        with replaced_layers(layers, injectors):
            yield
