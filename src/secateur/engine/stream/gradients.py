"""Statistics of the gradients of the calibration loss, with one decoder layer in memory.

They are gathered in the backward of a layer-wise pass (`layerwise.py`). Windows pass one at a time,
because the empirical Fisher needs the square of each window's own gradient.

Loss of a window: mean cross-entropy of its next tokens, in nats. Gathered per weight, over N
windows with gradients g_n: the statistics that read gradients (`calibration/statistics`).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from secateur.calibration.statistics import watched
from secateur.engine.stream.hidden_states import EmbeddingAndHead
from secateur.engine.stream.layerwise import LayerwisePass
from secateur.errors import NumericalError
from secateur.machine import full_float32
from secateur.models.architecture import Linear, linears_of
from secateur.parallel.ranks import ALONE, Ranks, micro_batches, rows_of
from secateur.progress import Progress
from secateur.runs.output import write_tensors


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
