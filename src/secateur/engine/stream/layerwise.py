"""Forwards and backwards through all decoder layers, with one layer in memory.

    forward     layer by layer, window after window:     hₗ₊₁ = fₗ(hₗ)
    losses      after the last layer, each window:       L, and g = ∂L/∂h
    backward    layer by layer, from the last; in each, window after window:
                    fₗ(hₗ) again;  g ← (∂fₗ/∂hₗ)ᵀ g  for the layer below;
                    the gradients of the layer's weights: the caller reads them

That is gradient checkpointing of whole layers, so the peak is one layer with its gradients, for any
number of layers. Hidden states and gradients are on disk. A killed run continues with the layer in
which it stopped.

`LayerwiseReader` only reads: batches of any shapes pass through all layers in the dtype of the
model, and the model continues from the outputs of the last one.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from secateur.calibration.statistics import watched
from secateur.engine.stream.calls import LayerCall, call_layer
from secateur.engine.stream.hidden_states import Activations, EmbeddingAndHead
from secateur.errors import NumericalError
from secateur.machine import full_float32
from secateur.models.architecture import Linear, linears_of
from secateur.models.targets import Target, walk_layers
from secateur.parallel.ranks import ALONE, Ranks, micro_batches, rows_of
from secateur.progress import Progress, Silent
from secateur.runs.output import write_tensors

OpenLayer = Callable[[int], AbstractContextManager[tuple[nn.Module, Callable[[int], None]]]]
"""The number of a layer → a context with the layer, and a function that is called after each window
with the window's place. The context leaves when everything of the layer is on disk."""


def _ignore(number: int) -> None:
    """Nothing to do."""


class LayerwisePass:
    """Some windows on their way through all layers and back.

    Args:
        outer: embedding and head of the model.
        windows: numbers of the windows, in the order of their passes.
        folder: of the hidden states and the gradients.
        call: numbers of a layer and of a window → how the layer is called. It is called once before
            the layer is opened, so what it computes for the whole layer needs no second layer.
        precision: makes the context of a forward.
        own: the range of the windows among those of all processes; None for a single process.
    """

    def __init__(
        self,
        outer: EmbeddingAndHead,
        windows: Sequence[int],
        folder: Path,
        call: Callable[[int, int], LayerCall],
        precision: Callable[[], AbstractContextManager[Any]],
        own: slice | None = None,
    ) -> None:
        self.outer, self.windows, self.call, self.precision = outer, windows, call, precision
        self.target, self.count = outer.target, len(outer.target.layers)
        first = 0 if own is None else own.start
        self.rows = [slice(row, row + 1) for row in range(first, first + len(windows))]
        (like,) = outer.embed([slice(windows[0], windows[0] + 1)])
        shape = (len(windows) if own is None else len(outer.windows), *like.shape[1:])
        for name in ("states", "gradients"):
            (folder / name).mkdir(parents=True, exist_ok=True)
        self.states = Activations(shape, like.dtype, folder / "states", False, own)
        self.gradients = Activations(shape, like.dtype, folder / "gradients", False, own)

    @property
    def passed(self) -> int:
        """The number of layers whose outputs an earlier run has stored."""
        return max((n for n in range(self.count + 1) if self.states.has(n)), default=0)

    @torch.no_grad()
    def forward(
        self, open_layer: OpenLayer, on_layer: Callable[[int], None] = _ignore, *, keep: bool = True
    ) -> None:
        """Store the inputs of every layer, and the outputs of the last one.

        Args:
            open_layer: opens a layer.
            on_layer: called after each layer, with its number.
            keep: whether the inputs of finished layers stay, for the backward.
        """
        states = self.states
        if not self.passed and not states.has(0):
            embedded = self.outer.embed([slice(n, n + 1) for n in self.windows])
            for rows, hidden in zip(self.rows, embedded, strict=True):
                states.write(rows, hidden)
            states.advance(0)
        for number in range(self.passed, self.count):
            states.resume(number)
            self.call(number, self.windows[0])  # what it computes must not wait for this layer
            with open_layer(number) as (layer, after_window):
                for place, rows in enumerate(self.rows):
                    states.write(rows, self.outputs(number, layer, place))
                    after_window(place)
                states.advance(number + 1)
            if not keep:
                states.forget(number)
            on_layer(number)
        states.resume(self.count)

    def outputs(self, number: int, layer: nn.Module, place: int) -> Tensor:
        """Pass a window through the current layer; the outputs are not stored."""
        call = self.call(number, self.windows[place])
        with self.precision():
            return call_layer(layer, self._read(self.states, self.rows[place]), call)

    def losses(self, loss: Callable[[int, Tensor], Tensor]) -> list[float]:
        """Store the gradients of the last layer's outputs. Return the losses.

        Args:
            loss: place of a window, and the outputs of the last layer for it → its loss.
        """
        found = []
        with self.outer.outside(), full_float32():
            for place, rows in enumerate(self.rows):
                hidden = self._read(self.states, rows).requires_grad_()
                with self.precision(), torch.enable_grad():
                    own = loss(place, hidden)
                (gradient,) = torch.autograd.grad(own, hidden)
                self.gradients.write(rows, gradient)
                found.append(own.item())
        self.gradients.advance(self.count)
        return found

    def backward(
        self,
        open_layer: OpenLayer,
        is_finished: Callable[[int], bool],
        on_layer: Callable[[int], None] = _ignore,
        lowest: int = 0,
    ) -> None:
        """Pass the gradients down through the layers.

        The gradients for the layer below are complete on disk before the layer's context leaves. So
        a stop between the two only means that this layer is passed again.

        Args:
            open_layer: opens a layer. After each window its parameters have their gradients.
            is_finished: whether an earlier run has finished a layer.
            on_layer: called after each layer, with its number.
            lowest: the last layer to pass; its inputs get no gradients. With -1 those of layer 0
                get them as well.
        """
        for number in reversed(range(max(lowest, 0), self.count)):
            if not is_finished(number):
                self._backward_layer(number, open_layer, to_inputs=number > lowest)
            # of a layer that an earlier run has finished too: it may have been killed before this
            self.gradients.forget(number + 1)
            self.states.forget(number + 1)
            on_layer(number)

    def _backward_layer(self, number: int, open_layer: OpenLayer, *, to_inputs: bool) -> None:
        self.states.resume(number)
        self.gradients.resume(number + 1)
        self.call(number, self.windows[0])
        with open_layer(number) as (layer, after_window), full_float32():
            for place, rows in enumerate(self.rows):
                hidden = self._read(self.states, rows).requires_grad_(to_inputs)
                call = self.call(number, self.windows[place])
                with self.precision(), torch.enable_grad():
                    out = call_layer(layer, hidden, call)
                out.backward(self._read(self.gradients, rows))  # starts from ∂L/∂out
                if hidden.grad is not None:
                    self.gradients.write(rows, hidden.grad)
                after_window(place)
            if to_inputs:
                self.gradients.advance(number)

    def _read(self, stored: Activations, rows: slice) -> Tensor:
        """The stored states of a window on the device."""
        return stored.read(rows).to(self.target.device)


class GradientPass:
    """Gathers statistics of every linear's gradients into files of the work folder.

    Args:
        outer: embedding and head of the dense model, with the calibration windows.
        names: names of the statistics.
        work: the folder, for `gradients-0000.safetensors` and so on; files of a stopped run are
            kept.
        progress: receives every step.
        ranks: the processes that share the windows.
    """

    def __init__(
        self,
        outer: EmbeddingAndHead,
        names: Collection[str],
        work: Path,
        progress: Progress,
        ranks: Ranks = ALONE,
    ) -> None:
        self.target, self.windows = outer.target, outer.windows
        self.names, self.work, self.progress, self.ranks = names, work, progress, ranks
        folder = work / "gradient-pass"
        folder.mkdir(exist_ok=True)
        # one window at a time, so that each has a gradient of its own
        each = rows_of(ranks.rank, micro_batches(len(self.windows), 1, ranks.count), ranks.count)
        own = slice(each[0].start, each[-1].stop)
        self.outer = EmbeddingAndHead(self.target, self.windows, folder, own)
        self.own = LayerwisePass(
            self.outer,
            range(own.start, own.stop),
            folder,
            lambda number, window: self.outer.call(number, [window]),
            nullcontext,
            own,
        )

    @full_float32()
    def execute(self) -> None:
        """Run forward, loss and backward. Steps that a killed run finished are skipped.

        Raises:
            NumericalError: the loss is NaN or infinite.
        """
        own, count = self.own, self.own.count
        self.progress.start("gradients", len(own.windows) * (2 * count + 1))
        files = [_gradient_file(self.work, n) for n in range(count)]
        finished = self.ranks.once(lambda: [n for n, file in enumerate(files) if file.exists()])
        if count - 1 not in finished and not all(self.ranks.gather(own.gradients.has(count))):
            own.forward(self._forward_layer)
            own.losses(self._loss)
        own.backward(self._backward_layer, lambda number: number in finished)
        self.progress.finish()

    @contextmanager
    def _forward_layer(self, number: int) -> Iterator[tuple[nn.Module, Callable[[int], None]]]:
        with self.target.layer(number) as layer:
            yield layer, lambda place: self.progress.step(note=f"forward, layer {number}")

    def _loss(self, place: int, hidden: Tensor) -> Tensor:
        """The mean cross-entropy of the next tokens."""
        row = self.own.windows[place]
        logits = self.outer.head(row, hidden)
        # the logits at a token predict the next one
        loss = cross_entropy(logits[:-1].float(), self.windows[row][1:].to(self.target.device))
        if not torch.isfinite(loss):
            raise NumericalError(
                f"the loss of calibration window {row} is {loss.item()}",
                remedy="the model overflows on this text; use float32 or bfloat16",
            )
        self.progress.step(note="loss")
        return loss

    @contextmanager
    def _backward_layer(self, number: int) -> Iterator[tuple[nn.Module, Callable[[int], None]]]:
        """A layer whose linears get gradients; in the end their statistics are in a file."""
        with self.target.layer(number) as layer:
            linears = list(linears_of(layer, self.target.architecture.layer_name(number)).values())
            leaves = [linear.module.get_parameter("weight") for linear in linears]

            def after(place: int) -> None:
                for leaf in leaves:
                    leaf.grad = None
                self.progress.step(note=f"backward, layer {number}")

            with only_learning(layer, leaves), watched(linears, self.names) as running:
                yield layer, after
        for own in running.values():
            for statistic in own.values():
                self.ranks.total(statistic.total)
        gathered = {
            f"{linear}/{name}": statistic.value().cpu().contiguous()
            for linear, own in running.items()
            for name, statistic in own.items()
        }
        self.ranks.wait()  # all have stored what the layer below needs
        self.ranks.once(lambda: write_tensors(_gradient_file(self.work, number), gathered))


@contextmanager
def only_learning(layer: nn.Module, leaves: Sequence[nn.Parameter]) -> Iterator[None]:
    """A context in which only some parameters of a layer get gradients, at first none.

    A loaded model gets back the gradients that its owner has.
    """
    before = [(x, x.requires_grad, x.grad) for x in layer.parameters()]
    for parameter in layer.parameters():
        parameter.requires_grad_(False)
        parameter.grad = None
    for leaf in leaves:
        leaf.requires_grad_(True)
    try:
        yield
    finally:
        for parameter, wanted, gradient in before:
            parameter.requires_grad_(wanted)
            parameter.grad = gradient


def stored_gradients(
    work: Path | None, index: int, names: Collection[str], device: torch.device
) -> Callable[[Linear], dict[str, Tensor]]:
    """Return a function that returns the stored statistics of a linear's gradients.

    Args:
        work: the folder of `GradientPass`; may be None without names.
        index: number of the decoder layer.
        names: names of the statistics; without names the function returns nothing.
        device: device of the returned tensors.
    """
    if not names or work is None:
        return lambda linear: {}
    stored = load_file(_gradient_file(work, index))
    return lambda linear: {name: stored[f"{linear.name}/{name}"].to(device) for name in names}


def _gradient_file(work: Path, index: int) -> Path:
    """The file with the statistics of one layer's gradients."""
    return work / f"gradients-{index:04d}.safetensors"


Continuing = Callable[..., AbstractContextManager[None]]
"""The place of a batch, and so many tokens of its first row (None for all of it) → a context in
which the model continues from its hidden states."""


class LayerwiseReader:
    """A model that reads token ids with one decoder layer in memory.

    Its forwards are those of the whole model: the same calls with the same shapes.

    Args:
        target: the model.
        states_bytes: of the hidden states that are in memory at once.
        progress: receives the layers, as notes of the stage that runs.
    """

    def __init__(
        self, target: Target, states_bytes: float, progress: Progress | None = None
    ) -> None:
        self.target, self.states_bytes = target, states_bytes
        self.progress = progress or Silent()
        self.module, self.device, self.dtype = target.model, target.device, target.dtype
        self.calls: dict[int, dict[int, list[LayerCall]]] = {}  # by length, then by windows

    def tokens_at_once(self, ids: Tensor) -> float:
        """Number of tokens whose hidden states are in memory at once, by those of a batch."""
        (hidden,) = self._embedded([ids])[1]
        return self.states_bytes * ids.numel() / hidden.nbytes

    def _embedded(self, batches: Sequence[Tensor]) -> tuple[EmbeddingAndHead, list[Tensor]]:
        """The inputs of the first layer for batches of one length, and what knows their calls."""
        windows = torch.cat([*batches])
        outer = EmbeddingAndHead(self.target, windows, fast=False)
        outer.recorded = self.calls.setdefault(windows.shape[1], outer.recorded)
        for size in {1, *map(len, batches)}:
            outer.calls(size)
        ends = accumulate(map(len, batches), initial=0)
        return outer, outer.embedded_in([slice(*rows) for rows in pairwise(ends)])

    def through(self, batches: Sequence[Tensor]) -> dict[int, tuple[EmbeddingAndHead, Tensor]]:
        """What the last layer returns for each batch, and what knows how the model goes on."""
        read = dict[int, tuple[EmbeddingAndHead, Tensor]]()
        for length in dict.fromkeys(ids.shape[1] for ids in batches):
            own = {place: ids for place, ids in enumerate(batches) if ids.shape[1] == length}
            outer, embedded = self._embedded([*own.values()])
            read |= {place: (outer, x) for place, x in zip(own, embedded, strict=True)}
        for number, layer in walk_layers(self.target):
            self.progress.step(0, note=f"layer {number + 1} of {len(self.target.layers)}")
            for place, (outer, hidden) in read.items():
                read[place] = outer, outer.run(number, layer, hidden)
        return read

    @contextmanager
    def passed(self, batches: Sequence[Tensor]) -> Iterator[Continuing]:
        """A context in which the model continues from what its last layer returns.

        Args:
            batches: token ids [windows, sequence_length], of any shapes.
        """
        read = self.through(batches)

        def continuing(place: int, tokens: int | None = None) -> AbstractContextManager[None]:
            outer, hidden = read[place]
            return outer.returning(hidden if tokens is None else hidden[:1, :tokens])

        with self.target.outside():
            yield continuing


class RememberingReader(LayerwiseReader):
    """A reader that keeps what its last layer returned: batches read again cost only the head.

    Arguments are those of `LayerwiseReader`; what is kept has no bound.
    """

    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        self.known: dict[Any, dict[int, tuple[EmbeddingAndHead, Tensor]]] = {}

    def through(self, batches: Sequence[Tensor]) -> dict[int, tuple[EmbeddingAndHead, Tensor]]:
        """What the last layer returns, or has returned."""
        key = tuple((ids.shape, ids.cpu().numpy().tobytes()) for ids in batches)
        if key not in self.known:
            self.known[key] = super().through(batches)
        return self.known[key]
