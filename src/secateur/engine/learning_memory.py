"""The memory that learning needs: tuning a layer, distilling a model."""

from __future__ import annotations

from collections import Counter

import torch
from torch import Tensor, nn

from secateur.engine.prune.tasks import Tasks
from secateur.engine.stream.attention import AttentionOfPlan, WrittenOut, writes_out
from secateur.engine.stream.calls import LayerCall, call_layer, first_inputs, layer_calls
from secateur.engine.stream.kinds import kind_of, on_meta
from secateur.engine.stream.residency import LiveTensors
from secateur.engine.stream.targets import Target
from secateur.models.architecture import text_config
from secateur.types import float32_bytes


def rehearse_training(
    layer: nn.Module, hidden: Tensor, call: LayerCall, *, written_out: bool = False
) -> int:
    """The memory that a layer's forward keeps alive in float32, with everything for its backward.

    Args:
        layer: a decoder layer with its parameters on the meta device.
        hidden: the input of a micro-batch, for its shape.
        call: how the layer is called for it.
        written_out: whether attention keeps its probabilities.
    """
    meta, parameters = torch.device("meta"), list(layer.parameters())
    call = call.to(meta, torch.float32)
    live = LiveTensors([*parameters, *layer.buffers(), *call.tensors()], find_peak=True)
    dtype = parameters[0].dtype
    with on_meta(layer):
        layer.to(torch.float32).requires_grad_(True)
        try:
            attention = WrittenOut() if written_out else AttentionOfPlan()
            with torch.enable_grad(), live, attention:
                x = torch.empty(hidden.shape, dtype=torch.float32, device=meta)
                out = call_layer(layer, x, call)
                del out
        finally:
            layer.to(dtype).requires_grad_(False)
    return live.peak_bytes


def tuning_bytes(target: Target, windows: Tensor) -> int:
    """The memory that tuning a layer needs besides the layer, for one micro-batch of windows."""
    hidden, calls = calls_of(target, windows)

    def of(layer: nn.Module, call: LayerCall) -> int:
        weights = 4 * sum(p.numel() for p in layer.parameters())
        plain = next(layer.parameters()).dtype == torch.float32
        # gradients, two moments, shadow or rounded weights; float32 copies of other dtypes
        return rehearse_training(layer, hidden, call) + weights * (4 if plain else 5)

    return max(of(layer, call) for layer, call, _ in kinds(target, calls))


def distilling_bytes(target: Target, window: Tensor) -> int:
    """Two whole models, one in float32 with gradients and moments, and one window's forward."""
    hidden, calls = calls_of(target, window)
    tokens = window.numel()
    weights = sum(p.numel() for p in target.model.parameters())
    trained = sum(p.numel() for p in target.layers.parameters())
    # logits of both models, and the gradient of one
    logits = 3 * 4 * tokens * int(text_config(target.model.config).vocab_size)
    written_out = writes_out(target.device, window.shape[1])
    forward = sum(
        count * rehearse_training(layer, hidden, call, written_out=written_out)
        for layer, call, count in kinds(target, calls)
    )
    return weights * (4 + target.dtype.itemsize) + 3 * 4 * trained + forward + logits


def sweep_bytes(target: Target, window: Tensor) -> int:
    """One decoder layer in float32 with gradients, moments and a mask, and one window's forward
    through it; or everything outside the layers in float32 with one window's logits.

    Args:
        target: the model.
        window: token ids [1, sequence_length].
    """
    hidden, calls = calls_of(target, window)
    weights = max(sum(p.numel() for p in layer.parameters()) for layer in target.layers)
    of_layers = sum(p.numel() for p in target.layers.parameters())
    outside = sum(p.numel() for p in target.model.parameters()) - of_layers
    logits = 3 * 4 * window.numel() * int(text_config(target.model.config).vocab_size)
    written_out = writes_out(target.device, window.shape[1])
    forward = max(
        rehearse_training(layer, hidden, call, written_out=written_out)
        for layer, call, _ in kinds(target, calls)
    )
    return max((4 * 4 + 1) * weights + forward, 4 * outside + logits)


def on_grid_bytes(tasks: Tasks) -> int:
    """The rounded copies of matrices that learn on a grid, which the backward reads."""
    return sum(float32_bytes(x.shape) for x in tasks.values() if x.rounded and x.method.solver.grid)


def calls_of(target: Target, windows: Tensor) -> tuple[Tensor, list[LayerCall]]:
    """The first layer's inputs for one micro-batch, and how each layer is called for it."""
    ids = windows.to(target.device)
    with target.outside():
        calls = layer_calls(target.model, target.layers, [ids, ids.flip(1)])
        return calls[0].packed(first_inputs(target.model, target.layers, ids)), calls


def kinds(target: Target, calls: list[LayerCall]) -> list[tuple[nn.Module, LayerCall, int]]:
    """One layer of each kind, how it is called, and the number of layers of that kind."""
    pairs = list(zip(target.layers, calls, strict=True))
    of = [kind_of(*pair) for pair in pairs]
    first = dict(zip(reversed(of), reversed(pairs), strict=True))
    return [(*first[kind], count) for kind, count in Counter(of).items()]
