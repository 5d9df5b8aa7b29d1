"""Calibration windows on their way through the decoder layers.

Two streams of hidden states can be under way: those of the model as it is pruned, and those of
the dense model, which are the targets of reconstruction.
"""

from __future__ import annotations

from functools import cached_property
from pathlib import Path

from torch import Tensor, nn

from secateur.engine.stream.activations import Activations
from secateur.engine.stream.calls import LayerCall, first_inputs, layer_calls
from secateur.engine.stream.kinds import Layout, layouts
from secateur.engine.stream.residency import Parking
from secateur.engine.stream.targets import Target

__all__ = ["Passage"]


class Passage:
    """Micro-batches, how they are handed to each layer, and where their hidden states wait.

    Args:
        target: the model.
        windows: calibration tokens [samples, sequence_length].
        micro_batch_tokens: tokens that pass through a layer at once.
        in_memory: whether hidden states are held in memory.
        work: folder they are (also) kept in; None for a run in memory only.
    """

    def __init__(
        self,
        target: Target,
        windows: Tensor,
        micro_batch_tokens: int,
        in_memory: bool,
        work: Path | None,
    ) -> None:
        self.target, self.windows, self.work = target, windows, work
        self.micro_batch_tokens, self.in_memory = micro_batch_tokens, in_memory
        self.calls: dict[int, list[LayerCall]] = {}
        self.hidden: Activations | None = None
        self.dense: Activations | None = None

    @cached_property
    def layouts(self) -> list[Layout]:
        """Which linears of each decoder layer share an input, for windows of this length.

        Raises:
            ArchitectureError: a layer cannot run by itself.
        """
        return layouts(self.target, self.windows.shape[1])

    def batches(self) -> list[slice]:
        """The micro-batches, as ranges of calibration windows."""
        samples, length = self.windows.shape
        size = max(1, self.micro_batch_tokens // length)
        return [slice(i, min(i + size, samples)) for i in range(0, samples, size)]

    def call(self, index: int, batch: slice) -> LayerCall:
        """How a layer is called for a micro-batch."""
        return self.calls[batch.stop - batch.start][index]

    def shared_tensors(self, index: int) -> list[Tensor]:
        """What a layer is handed besides its hidden states, for all sizes of micro-batch."""
        return [tensor for calls in self.calls.values() for tensor in calls[index].tensors()]

    def parking(self, index: int, layer: nn.Module, stream: Activations) -> Parking | None:
        """Where halted forwards of a layer are put: nowhere, when memory holds them.

        Args:
            index: of the layer.
            layer: with its weights.
            stream: the hidden states that pass it.
        """
        if self.in_memory and self.target.device.type == "cpu":
            return None
        permanent = [*layer.parameters(), *layer.buffers(), *self.shared_tensors(index)]
        folder = None if self.in_memory else stream.folder
        return Parking(permanent, folder, self.target.device)

    def record_calls(self, sizes: set[int]) -> None:
        """Learn how the model calls its layers, for micro-batches of so many windows."""
        device = self.target.device
        with self.target.outside():
            for size in sizes - set(self.calls):
                same = [slice(0, size), slice(len(self.windows) - size, len(self.windows))]
                ids = [self.windows[rows].to(device) for rows in same]
                calls = layer_calls(self.target.model, self.target.layers, ids)
                self.calls[size] = [call.to(device) for call in calls]

    def calls_of_one_window(self) -> list[LayerCall]:
        """How each layer is called for a single window."""
        self.record_calls({1})
        return self.calls[1]

    def open(self, start: int, *, dense: bool) -> int:
        """Make the hidden states that enter layer `start` ready, or else those of layer 0.

        Args:
            start: the layer to go on from, if its inputs were stored by an earlier run.
            dense: whether the dense model's hidden states go along.

        Returns:
            The layer whose inputs are ready: 0 where there are no stored ones.
        """
        self.record_calls({b.stop - b.start for b in self.batches()})
        streams = self.open_streams(dense)
        if start and all(stream.has(start) for stream in streams):
            for stream in streams:
                stream.resume(start)
            return start
        with self.target.outside():
            for batch in self.batches():
                ids = self.windows[batch].to(self.target.device)
                hidden = first_inputs(self.target.model, self.target.layers, ids)
                for stream in streams:
                    stream.write(batch, hidden)
        for stream in streams:
            stream.advance(0)
        return 0

    def open_streams(self, dense: bool) -> list[Activations]:
        """Empty streams, in memory or on disk."""
        with self.target.outside():
            ids = self.windows[:1].to(self.target.device)
            hidden = first_inputs(self.target.model, self.target.layers, ids)
        shape = (*self.windows.shape, hidden.shape[-1])
        self.hidden = Activations(shape, hidden.dtype, self.work, self.in_memory)
        if not dense:
            return [self.hidden]
        folder = self.work / "dense" if self.work else None
        if folder:
            folder.mkdir(exist_ok=True)
        self.dense = Activations(shape, hidden.dtype, folder, self.in_memory)
        return [self.hidden, self.dense]

    def read(self, rows: slice) -> Tensor:
        """Inputs of the layer in work, in the model as it is pruned, on the run's device."""
        assert self.hidden is not None
        return self.hidden.read(rows).to(self.target.device)

    def read_dense(self, rows: slice) -> Tensor:
        """The dense model's hidden states, on the run's device."""
        assert self.dense is not None
        return self.dense.read(rows).to(self.target.device)

    def write(self, rows: slice, hidden: Tensor) -> None:
        """Outputs of the layer in work, in the model as it is pruned."""
        assert self.hidden is not None
        self.hidden.write(rows, hidden)

    def write_dense(self, rows: slice, hidden: Tensor) -> None:
        """Outputs of the layer in work, in the dense model."""
        assert self.dense is not None
        self.dense.write(rows, hidden)

    def advance_dense(self, layer: int) -> None:
        """What was written of the dense model is its input of `layer`, and readable as such."""
        assert self.dense is not None
        self.dense.advance(layer)

    def advance(self, layer: int) -> None:
        """What was written becomes the input of `layer`."""
        if self.hidden is not None:
            self.hidden.advance(layer)

    def forget(self, layer: int) -> None:
        """The inputs of a finished layer are not needed any more."""
        for stream in (self.hidden, self.dense):
            if stream is not None:
                stream.forget(layer)

    def close(self) -> None:
        """Let go of the hidden states."""
        self.hidden = self.dense = None
