"""The hidden states of one model at one decoder layer, and how they pass through it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

from torch import Tensor, nn

from secateur.engine.stream.activations import Activations
from secateur.engine.stream.calls import LayerCall, call_layer
from secateur.engine.stream.passage import Passage
from secateur.engine.stream.residency import Parking


def nothing() -> None:
    """Report nothing."""


@dataclass(frozen=True)
class Lane:
    """The hidden states of one model at one decoder layer.

    Attributes:
        passage: the micro-batches, and how the layer is called for each.
        states: where the hidden states are read from and written to.
        index: the number of the layer.
        matmuls: returns a context for the forwards.
        step: called after every forward.
    """

    passage: Passage
    states: Activations
    index: int
    matmuls: Callable[[], AbstractContextManager[object]] = nullcontext
    step: Callable[[], None] = nothing

    @property
    def batches(self) -> list[slice]:
        """The micro-batches, as ranges of calibration windows."""
        return self.passage.batches()

    def read(self, batch: slice) -> Tensor:
        """The inputs of the layer, on the device of the model."""
        return self.states.read(batch).to(self.passage.target.device)

    def write(self, batch: slice, outputs: Tensor) -> None:
        """Store the outputs of the layer."""
        self.states.write(batch, outputs)

    def call(self, batch: slice) -> LayerCall:
        """How the model calls the layer for a micro-batch."""
        return self.passage.call(self.index, batch)

    def parking(self, layer: nn.Module) -> Parking | None:
        """The parking of halted forwards; None if they stay in memory."""
        return self.passage.parking(self.index, layer, self.states)

    def outputs(self, layer: nn.Module, batch: slice) -> Tensor:
        """Pass one micro-batch through the layer; the outputs are not stored."""
        with self.matmuls():
            outputs = call_layer(layer, self.read(batch), self.call(batch))
        self.step()
        return outputs

    def pass_one(self, layer: nn.Module, batch: slice, *, stores: bool = True) -> None:
        """Pass one micro-batch through the layer; its outputs can be stored."""
        outputs = self.outputs(layer, batch)
        if stores:
            self.write(batch, outputs)

    def pass_through(self, layer: nn.Module) -> None:
        """Pass every micro-batch through the layer, and store the outputs."""
        for batch in self.batches:
            self.pass_one(layer, batch)
