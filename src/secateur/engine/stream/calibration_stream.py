"""Passes calibration windows through the decoder layers, in micro-batches.

Two sets of hidden states can pass together: the hidden states of the pruned model, and the hidden
states of the dense model, which are the targets of reconstruction.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor, nn

from secateur.engine.stream.calls import LayerCall, LayerLayout, call_layer, layouts
from secateur.engine.stream.hidden_states import Activations, EmbeddingAndHead
from secateur.models.targets import Target, walk_layers
from secateur.parallel.ranks import ALONE, Ranks, micro_batches, rows_of

_STORED_EVERY = 4
"""The most layers that a stopped run repeats."""


def _nothing() -> None:
    """Report nothing."""


class CalibrationStream:
    """Micro-batches, how each layer is called for them, and where their hidden states are.

    Args:
        target: the model.
        windows: calibration tokens [samples, sequence_length].
        micro_batch_tokens: tokens that pass through a layer at once.
        in_memory: whether hidden states are in memory.
        work: folder that keeps them (as well); None for a run in memory only.
        ranks: the processes that share the windows. Each has the hidden states of its own.
        on_gpu: whether hidden states and halted forwards that are in memory stay in the memory of
            the target's GPU. Then no layer waits for copies between host and GPU.
    """

    def __init__(
        self,
        target: Target,
        windows: Tensor,
        micro_batch_tokens: int,
        in_memory: bool,
        work: Path | None,
        ranks: Ranks = ALONE,
        *,
        on_gpu: bool = False,
    ) -> None:
        self.home = target.device if on_gpu else torch.device("cpu")
        self.target, self.windows, self.work = target, windows, work
        self.micro_batch_tokens, self.in_memory = micro_batch_tokens, in_memory
        self.ranks = ranks

    @cached_property
    def outer(self) -> EmbeddingAndHead:
        """What is before and behind the layers, and how these are called."""
        folder = None if self.in_memory else self.work
        return EmbeddingAndHead(self.target, self.windows, folder, self.own)

    @cached_property
    def layouts(self) -> list[LayerLayout]:
        """Which linears of each decoder layer share an input, for windows of this length.

        Raises:
            ArchitectureError: a layer cannot run by itself.
        """
        return layouts(self.target, self.windows.shape[1])

    @property
    def windows_at_once(self) -> int:
        """The most windows in a micro-batch; one process has so many in all but the last."""
        samples, length = self.windows.shape
        return min(samples, max(1, self.micro_batch_tokens // length))

    def batches(self) -> list[slice]:
        """The micro-batches of this process, as ranges of calibration windows."""
        count = self.ranks.count
        cut = micro_batches(len(self.windows), self.windows_at_once, count)
        return rows_of(self.ranks.rank, cut, count)

    @property
    def some_idle(self) -> bool:
        """Whether there are fewer micro-batches than processes."""
        return -(-len(self.windows) // self.windows_at_once) < self.ranks.count

    @property
    def own(self) -> slice:
        """The windows of this process; an empty range if it has none."""
        batches = self.batches()
        return slice(batches[0].start, batches[-1].stop) if batches else slice(0, 0)

    def call(self, index: int, batch: slice) -> LayerCall:
        """How a layer is called for a micro-batch."""
        return self.outer.call(index, range(batch.start, batch.stop))

    def open(self, start: int = 0, *, dense: bool = False, rarely: bool = False) -> OpenStream:
        """Make the inputs of layer `start` ready, or those of the last one before it that a stopped
        run has stored, or else those of layer 0.

        Args:
            start: the layer to resume from.
            dense: whether the dense model's hidden states pass as well.
            rarely: whether hidden states in memory that are larger than a layer are stored for
                every few layers only. Storing them would take longer than to repeat these.
        """
        batches = self.batches()
        for size in {batch.stop - batch.start for batch in batches}:
            self.outer.calls(size)  # recorded before any layer has its weights
        if self.ranks.count > 1:
            self.outer.calls()  # tuning takes the windows of a process one by one
        every = self._states(dense, rarely)
        stored = [n for n in range(1, start + 1) if all(states.has(n) for states in every)]
        # A layer is resumed only if all processes have its inputs.
        start = max(set.intersection(*map(set, self.ranks.gather(stored))), default=0)

        def forget_stopped() -> None:
            for states in every:
                states.forget_all_but(start)

        self.ranks.once(forget_stopped)
        if start:
            for states in every:
                states.resume(start)
            return OpenStream(self, start, every)
        for batch, hidden in zip(batches, self.outer.embed(batches), strict=True):
            for states in every:
                states.write(batch, hidden)
        for states in every:
            states.advance(0)
        return OpenStream(self, 0, every)

    def _states(self, dense: bool, rarely: bool) -> list[Activations]:
        """Empty hidden states, in memory or on disk."""
        (hidden,) = self.outer.embed([slice(0, 1)])  # shows width and dtype as they travel
        shape = (*self.windows.shape, hidden.shape[-1])
        every = 1
        if rarely:
            layer_bytes = sum(x.nbytes for x in self.target.layers[0].parameters())
            every = min(max(hidden.nbytes * len(self.windows) // layer_bytes, 1), _STORED_EVERY)
        folders = [self.work, *([self.work and self.work / "dense"] if dense else [])]
        for folder in folders[1:]:
            if folder:
                folder.mkdir(exist_ok=True)
        return [
            Activations(
                shape, hidden.dtype, folder, self.in_memory, self.own, home=self.home, every=every
            )
            for folder in folders
        ]


@dataclass(frozen=True)
class OpenStream:
    """A calibration stream with its hidden states. They are released with it.

    Attributes:
        stream: the calibration stream.
        start: the layer whose inputs were ready first: 0 if no run had stored those asked for.
        every: the hidden states of the pruned model, and those of the dense one if they pass.
    """

    stream: CalibrationStream
    start: int
    every: Sequence[Activations]

    @property
    def hidden(self) -> Activations:
        """The hidden states of the pruned model."""
        return self.every[0]

    def batches(self) -> list[slice]:
        """The micro-batches of this process, as ranges of calibration windows."""
        return self.stream.batches()

    def walk(self, stop: int | None = None) -> Iterator[tuple[int, nn.Module]]:
        """Yield each layer with its weights. Outputs that the caller stores enter the next layer.

        When the loop ends early, the last layer's outputs are dropped.

        Args:
            stop: the layer after the last one to visit; None to visit all that follow.

        Yields:
            The number of a layer, and the layer.
        """
        target = self.stream.target
        count = len(target.layers)
        for number, layer in walk_layers(
            target, range(self.start, count if stop is None else stop)
        ):
            yield number, layer
            if number + 1 < count:
                self.advance(number + 1)
            self.stream.ranks.wait()  # all have stored the next inputs before one forgets these
            self.forget_before(number + 1)

    def layer_inputs(
        self,
        index: int,
        matmuls: Callable[[], AbstractContextManager[object]] = nullcontext,
        step: Callable[[], None] = _nothing,
        *,
        dense: bool = False,
    ) -> LayerInputs:
        """The hidden states of the pruned or the dense model at a layer.

        Args:
            index: number of the layer.
            matmuls: returns a context for the forwards.
            step: called after every forward.
            dense: of the dense model, if its hidden states pass.
        """
        return LayerInputs(self.stream, self.every[dense], index, matmuls, step)

    def read(self, rows: slice) -> Tensor:
        """Inputs of the current layer in the pruned model, on the target's device."""
        return self.hidden.read(rows).to(self.stream.target.device)

    def write(self, rows: slice, hidden: Tensor) -> None:
        """Store outputs of the current layer in the pruned model."""
        self.hidden.write(rows, hidden)

    def advance(self, layer: int) -> None:
        """Make the stored outputs the inputs of `layer` in the pruned model."""
        self.hidden.advance(layer)

    def forget_before(self, layer: int) -> None:
        """Delete the inputs of earlier layers, if no stopped run would continue there."""
        for states in self.every:
            if layer % states.every == 0 or layer == len(self.stream.target.layers):
                for earlier in range(layer):  # another process may have stored later ones by now
                    states.forget(earlier)


@dataclass(frozen=True)
class LayerInputs:
    """The hidden states of one model at one decoder layer.

    Attributes:
        calibration: the micro-batches, and how the layer is called for each.
        states: where the hidden states are read from and written to.
        index: the number of the layer.
        matmuls: returns a context for the forwards.
        step: called after every forward.
    """

    calibration: CalibrationStream
    states: Activations
    index: int
    matmuls: Callable[[], AbstractContextManager[object]] = nullcontext
    step: Callable[[], None] = _nothing

    @property
    def batches(self) -> list[slice]:
        """The micro-batches, as ranges of calibration windows."""
        return self.calibration.batches()

    def read(self, batch: slice) -> Tensor:
        """The inputs of the layer, on the device of the model."""
        return self.states.read(batch).to(self.calibration.target.device)

    def write(self, batch: slice, outputs: Tensor) -> None:
        """Store the outputs of the layer."""
        self.states.write(batch, outputs)

    def call(self, batch: slice) -> LayerCall:
        """How the model calls the layer for a micro-batch."""
        return self.calibration.call(self.index, batch)

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
