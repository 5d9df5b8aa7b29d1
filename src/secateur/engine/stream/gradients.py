"""Gradients of the calibration loss, with one decoder layer in memory.

A forward keeps the inputs of every layer on disk; the backward goes layer by layer from the last,
running each again from its inputs. That is gradient checkpointing at layer granularity, so the
peak is one layer with its gradients, whatever the depth. One window at a time, because the
empirical Fisher needs the square of each window's own gradient.

Loss of a window: mean cross-entropy of its next tokens, in nats. Gathered per weight, over N
windows with gradients g_n: the statistics that read gradients (`calibration/statistics`).
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from secateur.calibration.statistics import statistics
from secateur.engine.stream.activations import Activations
from secateur.engine.stream.calls import (
    LayerCall,
    StandIn,
    call_layer,
    first_inputs,
    replaced_layers,
)
from secateur.engine.stream.targets import Target
from secateur.errors import NumericalError
from secateur.models.architecture import Linear, linears_of
from secateur.precision import full_float32
from secateur.progress import Progress
from secateur.runs.atomic import write_tensors

__all__ = ["gather_gradients", "injected", "stored_gradients"]


class Injector(StandIn):
    """Stands in for a decoder layer: whatever comes in, the given hidden states come out.

    Args:
        layer: the layer.
        call: how the model calls it.
        hidden: what comes out.
    """

    def __init__(self, layer: nn.Module, call: LayerCall, hidden: Tensor) -> None:
        super().__init__(layer, call.in_tuple)
        self.hidden = hidden

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return the given hidden states."""
        return self.answer(self.hidden)


def injected(layers: nn.ModuleList, calls: list[LayerCall], hidden: Tensor) -> list[nn.Module]:
    """Stand-ins for all decoder layers, so that a model makes its output of the last ones'."""
    return [Injector(x, call, hidden) for x, call in zip(layers, calls, strict=True)]


class GradientPass:
    """Gathers the statistics of every linear's gradients.

    Args:
        target: the model, dense.
        names: of the statistics.
        windows: calibration tokens [samples, sequence_length].
        calls: how each layer is called for one window.
        work: folder that takes `gradients-0000.safetensors` and so on; what is there is kept.
        progress: told of every step.
    """

    def __init__(
        self,
        target: Target,
        names: frozenset[str],
        windows: Tensor,
        calls: list[LayerCall],
        work: Path,
        progress: Progress,
    ) -> None:
        self.target, self.names, self.windows, self.calls = target, names, windows, calls
        self.work, self.progress = work / "gradient-pass", progress
        self.results = work
        self.work.mkdir(exist_ok=True)
        with target.outside():
            hidden = first_inputs(target.model, target.layers, windows[:1].to(target.device))
        shape = (*windows.shape, hidden.shape[-1])
        self.inputs = Activations(shape, hidden.dtype, self.work, in_memory=False)
        upstream = self.work / "upstream"
        upstream.mkdir(exist_ok=True)
        self.upstream = Activations(shape, hidden.dtype, upstream, in_memory=False)

    def result(self, index: int) -> Path:
        """The file of one layer."""
        return gradient_file(self.results, index)

    def execute(self) -> None:
        """Forward, loss, backward; each layer's step is skipped if a killed run had done it."""
        count = len(self.target.layers)
        samples = self.windows.shape[0]
        self.progress.start("gradients", samples * (2 * count + 1))
        if not self.result(count - 1).exists() and not self.upstream.has(count):
            self.forward(count)
            self.loss(count)
        for index in reversed(range(count)):
            if not self.result(index).exists():
                self.backward(index)
            self.inputs.forget(index + 1)
        self.progress.finish()

    @torch.no_grad()
    def forward(self, count: int) -> None:
        """Keep the inputs of every layer."""
        if not self.inputs.has(0):
            with self.target.outside():
                for row, ids in enumerate(self.windows):
                    ids = ids[None].to(self.target.device)
                    hidden = first_inputs(self.target.model, self.target.layers, ids)
                    self.inputs.write(slice(row, row + 1), hidden)
            self.inputs.advance(0)
        for index in range(count):
            self.inputs.layer = index
            if self.inputs.has(index + 1):
                continue
            with self.target.layer(index) as layer:
                for row in range(self.windows.shape[0]):
                    rows = slice(row, row + 1)
                    hidden = self.inputs.read(rows).to(self.target.device)
                    self.inputs.write(rows, call_layer(layer, hidden, self.calls[index]))
                    self.progress.step(note=f"forward, layer {index}")
            self.inputs.advance(index + 1)

    def loss(self, count: int) -> None:
        """From the last hidden states through the head: the gradient that enters the last layer."""
        self.inputs.layer = count
        model, layers = self.target.model, self.target.layers
        with self.target.outside(), torch.enable_grad():
            for row, ids in enumerate(self.windows):
                rows = slice(row, row + 1)
                ids = ids[None].to(self.target.device)
                hidden = self.inputs.read(rows).to(self.target.device).requires_grad_()
                with replaced_layers(layers, injected(layers, self.calls, hidden)):
                    logits = model(input_ids=ids, use_cache=False).logits
                loss = cross_entropy(logits[0, :-1].float(), ids[0, 1:])
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
        samples = self.windows.shape[0]
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
            for row in range(samples):
                rows = slice(row, row + 1)
                hidden = self.inputs.read(rows).to(self.target.device).requires_grad_()
                out = call_layer(layer, hidden, self.calls[index])
                upstream = self.upstream.read(rows).to(self.target.device)
                found = torch.autograd.grad(out, [hidden, *leaves], upstream)
                self.upstream.write(rows, found[0])
                for linear, own, gradient in zip(linears, running, found[1:], strict=True):
                    for statistic in own.values():
                        statistic.update(gradient.t() if linear.transposed else gradient)
                self.progress.step(note=f"backward, layer {index}")
            for leaf, before in zip(leaves, wanted_before, strict=True):
                leaf.requires_grad_(before)
        gathered = {
            f"{linear.name}/{name}": statistic.value().cpu().contiguous()
            for linear, own in zip(linears, running, strict=True)
            for name, statistic in own.items()
        }
        self.upstream.advance(index)
        write_tensors(self.result(index), gathered)
        self.upstream.forget(index + 1)


@full_float32()
def gather_gradients(
    target: Target,
    names: frozenset[str],
    windows: Tensor,
    calls: list[LayerCall],
    work: Path,
    progress: Progress,
) -> None:
    """Gather statistics of every linear's gradients into files of the work folder.

    Args:
        target: the model, dense.
        names: of the statistics.
        windows: calibration tokens [samples, sequence_length].
        calls: how each layer is called for one window.
        work: the folder.
        progress: told of every step.

    Raises:
        NumericalError: the loss is NaN or infinite.
    """
    GradientPass(target, names, windows, calls, work, progress).execute()


def stored_gradients(
    work: Path | None, index: int, names: frozenset[str], device: torch.device
) -> Callable[[Linear], dict[str, Tensor]]:
    """A function that returns the statistics of a linear's gradients, as they were gathered.

    Args:
        work: the folder that took them; may be None without names.
        index: of the decoder layer.
        names: of the statistics; without any the function returns nothing.
        device: where the statistics are put.
    """
    if not names:
        return lambda linear: {}
    assert work is not None
    stored = load_file(gradient_file(work, index))
    return lambda linear: {name: stored[f"{linear.name}/{name}"].to(device) for name in names}


def gradient_file(work: Path, index: int) -> Path:
    """The file with the statistics of one layer's gradients."""
    return work / f"gradients-{index:04d}.safetensors"
