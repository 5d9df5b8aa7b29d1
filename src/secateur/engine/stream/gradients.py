"""Gradients of the calibration loss, with one decoder layer in memory.

A forward keeps the inputs of every layer on disk. The backward goes layer by layer from the last
one, and runs each again from its inputs. That is gradient checkpointing of whole layers, so the
peak is one layer with its gradients, for any number of layers. Windows pass one at a time, because
the empirical Fisher needs the square of each window's own gradient.

Loss of a window: mean cross-entropy of its next tokens, in nats. Gathered per weight, over N
windows with gradients g_n: the statistics that read gradients (`calibration/statistics`).
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.functional import cross_entropy

from secateur.calibration.statistics import statistics
from secateur.engine.stream.activations import Activations
from secateur.engine.stream.calls import call_layer
from secateur.engine.stream.embedding_and_head import EmbeddingAndHead
from secateur.engine.stream.targets import walk_layers
from secateur.errors import NumericalError
from secateur.models.architecture import Linear, linears_of
from secateur.parallel.ranks import ALONE, Ranks, micro_batches, rows_of
from secateur.precision import full_float32
from secateur.progress import Progress
from secateur.runs.atomic import write_tensors


class GradientPass:
    """Gathers the statistics of every linear's gradients.

    Args:
        outer: embedding and head of the dense model, with the calibration windows.
        names: names of the statistics.
        work: folder for `gradients-0000.safetensors` and so on; existing files are kept.
        progress: receives every step.
        ranks: the processes that share the windows.
    """

    def __init__(
        self,
        outer: EmbeddingAndHead,
        names: frozenset[str],
        work: Path,
        progress: Progress,
        ranks: Ranks = ALONE,
    ) -> None:
        self.target, self.windows = outer.target, outer.windows
        self.names, self.ranks = names, ranks
        self.work, self.progress = work / "gradient-pass", progress
        self.results = work
        self.work.mkdir(exist_ok=True)
        each = micro_batches(len(self.windows), 1, ranks.count)
        self.each = rows_of(ranks.rank, each, ranks.count)
        own = slice(self.each[0].start, self.each[-1].stop)
        self.outer = EmbeddingAndHead(self.target, self.windows, self.work, own)
        (hidden,) = self.outer.embed([slice(0, 1)])
        shape = (*self.windows.shape, hidden.shape[-1])
        self.inputs = Activations(shape, hidden.dtype, self.work, False, own)
        upstream = self.work / "upstream"
        upstream.mkdir(exist_ok=True)
        self.upstream = Activations(shape, hidden.dtype, upstream, False, own)

    def result(self, index: int) -> Path:
        """The file of one layer."""
        return _gradient_file(self.results, index)

    def execute(self) -> None:
        """Run forward, loss and backward. Steps that a killed run finished are skipped."""
        count = len(self.target.layers)
        self.progress.start("gradients", len(self.each) * (2 * count + 1))
        finished = set(self.ranks.once(lambda: self.finished(count)))
        if count - 1 not in finished and not all(self.ranks.gather(self.upstream.has(count))):
            self.forward(count)
            self.loss(count)
        for index in reversed(range(count)):
            if index not in finished:
                self.backward(index)
            self.inputs.forget(index + 1)
        self.progress.finish()

    def finished(self, count: int) -> list[int]:
        """The layers whose files an earlier run has written."""
        return [index for index in range(count) if self.result(index).exists()]

    @torch.no_grad()
    def forward(self, count: int) -> None:
        """Keep the inputs of every layer."""
        if not self.inputs.has(0):
            for rows, hidden in zip(self.each, self.outer.embed(self.each), strict=True):
                self.inputs.write(rows, hidden)
            self.inputs.advance(0)
        missing = [index for index in range(count) if not self.inputs.has(index + 1)]
        for index, layer in walk_layers(self.target, missing):
            self.inputs.layer = index
            for rows in self.each:
                hidden = self.inputs.read(rows).to(self.target.device)
                call = self.outer.call(index, [rows.start])
                self.inputs.write(rows, call_layer(layer, hidden, call))
                self.progress.step(note=f"forward, layer {index}")
            self.inputs.advance(index + 1)

    def loss(self, count: int) -> None:
        """Pass the last hidden states through the head. Return the gradient of the last layer."""
        self.inputs.layer = count
        with self.outer.outside(), torch.enable_grad():
            for rows in self.each:
                row, ids = rows.start, self.windows[rows.start]
                hidden = self.inputs.read(rows).to(self.target.device).requires_grad_()
                logits = self.outer.head(row, hidden)
                loss = cross_entropy(logits[:-1].float(), ids[1:].to(self.target.device))
                if not torch.isfinite(loss):
                    raise NumericalError(
                        f"the loss of calibration window {row} is {loss.item()}",
                        remedy="the model overflows on this text; use float32 or bfloat16",
                    )
                (gradient,) = torch.autograd.grad(loss, hidden)
                self.upstream.write(rows, gradient)
                self.progress.step(note="loss")
        self.upstream.advance(count)

    def backward(self, index: int) -> None:
        """Gradients of one layer's linears, and of its inputs."""
        self.inputs.layer, self.upstream.layer = index, index + 1
        with self.target.layer(index) as layer, torch.enable_grad():
            linears = list(linears_of(layer, self.target.architecture.layer_name(index)).values())
            leaves = [linear.module.get_parameter("weight") for linear in linears]
            wanted_before = [leaf.requires_grad for leaf in leaves]
            for leaf in leaves:
                leaf.requires_grad_(True)
            running = [
                {name: statistics[name](x.shape, x.weight.device) for name in sorted(self.names)}
                for x in linears
            ]
            for rows in self.each:
                hidden = self.inputs.read(rows).to(self.target.device).requires_grad_()
                out = call_layer(layer, hidden, self.outer.call(index, [rows.start]))
                upstream = self.upstream.read(rows).to(self.target.device)
                found = torch.autograd.grad(out, [hidden, *leaves], upstream)
                self.upstream.write(rows, found[0])
                for linear, own, gradient in zip(linears, running, found[1:], strict=True):
                    for statistic in own.values():
                        statistic.update(gradient.t() if linear.transposed else gradient)
                self.progress.step(note=f"backward, layer {index}")
            for leaf, before in zip(leaves, wanted_before, strict=True):
                leaf.requires_grad_(before)
        for own in running:
            for statistic in own.values():
                self.ranks.total(statistic.total)
        gathered = {
            f"{linear.name}/{name}": statistic.value().cpu().contiguous()
            for linear, own in zip(linears, running, strict=True)
            for name, statistic in own.items()
        }
        self.upstream.advance(index)
        self.ranks.wait()  # all have stored what the layer below needs
        self.ranks.once(lambda: write_tensors(self.result(index), gathered))
        self.upstream.forget(index + 1)


@full_float32()
def gather_gradients(
    outer: EmbeddingAndHead,
    names: frozenset[str],
    work: Path,
    progress: Progress,
    ranks: Ranks = ALONE,
) -> None:
    """Gather statistics of every linear's gradients into files of the work folder.

    Args:
        outer: embedding and head of the dense model, with the calibration windows.
        names: names of the statistics.
        work: the folder; files of a stopped run are kept.
        progress: receives every step.
        ranks: the processes that share the windows.

    Raises:
        NumericalError: the loss is NaN or infinite.
    """
    GradientPass(outer, names, work, progress, ranks).execute()


def stored_gradients(
    work: Path | None, index: int, names: frozenset[str], device: torch.device
) -> Callable[[Linear], dict[str, Tensor]]:
    """Return a function that returns the stored statistics of a linear's gradients.

    Args:
        work: the folder of `gather_gradients`; may be None without names.
        index: number of the decoder layer.
        names: names of the statistics; without names the function returns nothing.
        device: device of the returned tensors.
    """
    if not names:
        return lambda linear: {}
    assert work is not None
    stored = load_file(_gradient_file(work, index))
    return lambda linear: {name: stored[f"{linear.name}/{name}"].to(device) for name in names}


def _gradient_file(work: Path, index: int) -> Path:
    """The file with the statistics of one layer's gradients."""
    return work / f"gradients-{index:04d}.safetensors"
