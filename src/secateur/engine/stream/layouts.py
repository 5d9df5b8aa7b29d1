"""Which linears of a decoder layer share an input.

Hybrids have layers of several kinds: attention, linear attention, convolution, state space, dense
and sparse feed-forward. So each kind has its own groups. They are the groups that the family
declares, if these hold all linears of the layer. Otherwise one layer of the kind runs once to
find the groups. A checkpoint's layers run without their weights, on the meta device. So a model
that cannot be pruned is refused before any work.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from secateur.engine.stream.calls import LayerCall, call_layer, first_inputs, in_short, layer_calls
from secateur.errors import ArchitectureError, SecateurError
from secateur.models.architecture import Groups, Linear, linears_of
from secateur.models.targets import Target

TOKENS = 64
"""The length of the window for finding linears that share an input."""


@dataclass(frozen=True)
class LayerLayout:
    """The linears of one kind of layer, by their names within it.

    Attributes:
        groups: linears that share an input, in the order they run.
        unseen: linears whose input no hook sees, or that get several inputs in one forward. Scores
            and solvers that need inputs cannot use them.
    """

    groups: Groups
    unseen: tuple[str, ...] = ()


def kind_of(layer: nn.Module, call: LayerCall | None = None) -> Hashable:
    """A value that layers of one kind have in common.

    It holds classes, shapes and plain settings of all modules, and with `call` the shapes and plain
    values of the layer's arguments.
    """
    made_of = tuple(
        (
            path,
            type(module),
            tuple((name, tuple(p.shape)) for name, p in module.named_parameters(recurse=False)),
            tuple(
                (name, value)
                for name, value in sorted(vars(module).items())
                if isinstance(value, (bool, int, str)) and name not in ("layer_idx", "training")
            ),
        )
        for path, module in layer.named_modules()
    )
    if call is None:
        return made_of
    plain = [(k, v) for k, v in call.kwargs.items() if isinstance(v, (bool, int, str, type(None)))]
    shapes = tuple(tuple(t.shape) for t in call.tensors())
    return made_of, shapes, tuple(sorted(plain, key=str))


def layouts(target: Target, length: int) -> list[LayerLayout]:
    """The layout of every decoder layer.

    Args:
        target: the model; layers of a checkpoint stay empty.
        length: length of calibration windows.

    Raises:
        ArchitectureError: a layer cannot run by itself, or the model does not call its layers as
            a plain decoder does.
    """
    declared = [declared_layout(target, layer) for layer in target.layers]
    if all(layout is not None for layout in declared):
        return [layout for layout in declared if layout is not None]
    vocabulary = int(target.model.get_input_embeddings().weight.shape[0])
    # different tokens, so that two inputs of the layer are not equal by chance
    ids = torch.arange(min(length, TOKENS))[None] % vocabulary
    hidden, calls = calls_of(target, ids)
    found: dict[Hashable, LayerLayout] = {}
    result = []
    for index, (layer, known) in enumerate(zip(target.layers, declared, strict=True)):
        kind = kind_of(layer, calls[index])
        if known is None and kind not in found:
            name = target.architecture.layer_name(index)
            found[kind] = _seen_layout(layer, name, hidden, calls[index])
        result.append(known or found[kind])
    return result


def declared_layout(target: Target, layer: nn.Module) -> LayerLayout | None:
    """The groups that the family declares; None if they miss a linear of the layer."""
    if target.architecture.groups is None:
        return None
    there = linears_of(layer, "")
    groups = [[n for n in group if n in there] for group in target.architecture.groups]
    if {name for group in groups for name in group} != set(there):
        return None
    return LayerLayout(tuple(tuple(group) for group in groups if group))


def calls_of(target: Target, windows: Tensor) -> tuple[Tensor, list[LayerCall]]:
    """The first layer's inputs for one micro-batch, and how each layer is called for it."""
    ids = windows.to(target.device)
    with target.outside():
        calls = layer_calls(target.model, target.layers, [ids, ids.flip(1)])
        return calls[0].packed(first_inputs(target.model, target.layers, ids)), calls


def _seen_layout(layer: nn.Module, name: str, hidden: Tensor, call: LayerCall) -> LayerLayout:
    """The layout of a layer, from one forward."""
    linears = linears_of(layer, name)
    device = next(layer.parameters()).device

    def forward() -> None:
        with torch.no_grad():
            call_layer(layer, hidden.to(device), call.to(device))

    try:
        with on_meta(layer) if device.type == "meta" else nullcontext():
            groups = find_groups(list(linears.values()), forward)
    except SecateurError:
        raise
    except Exception as fault:
        raise ArchitectureError(
            f"a {type(layer).__name__} does not run by itself ({in_short(fault)})",
            where=name,
            remedy="this family cannot be pruned layer by layer yet",
        ) from fault
    short = {id(linear.module): n for n, linear in linears.items()}
    named = [tuple(short[id(x.module)] for x in group) for group in groups]
    often = [n for group in named for n in group]  # twice: it gets several inputs in one forward
    unseen = tuple(n for n in linears if often.count(n) != 1)
    kept = (tuple(n for n in group if n not in unseen) for group in named)
    return LayerLayout(tuple(group for group in kept if group), unseen)


@contextmanager
def on_meta(layer: nn.Module) -> Iterator[None]:
    """A context in which the buffers of a layer without weights are on the meta device too."""
    buffers = dict(layer.named_buffers())
    layer.to("meta")
    try:
        yield
    finally:
        for name, buffer in buffers.items():
            path, _, leaf = name.rpartition(".")
            layer.get_submodule(path)._buffers[leaf] = buffer


def input_mark(x: Tensor) -> Hashable:
    """A value that identifies an input in memory: its storage, and its part of the storage."""
    version = 0 if x.is_inference() else x._version  # counts changes in place
    return x.untyped_storage()._cdata, x.storage_offset(), tuple(x.shape), x.stride(), version


def find_groups(linears: Sequence[Linear], forward: Callable[[], object]) -> list[list[Linear]]:
    """Run a layer once to find the linears that share an input, in the order of their calls.

    Args:
        linears: all linears of the layer.
        forward: runs the layer on a sample of its input.
    """
    arrivals: dict[Hashable, list[Linear]] = {}
    keep: list[Tensor] = []  # the address of a freed input could be reused by another

    def watch(linear: Linear) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def before(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            keep.append(args[0])
            arrivals.setdefault(input_mark(args[0]), []).append(linear)

        return before

    handles = [linear.module.register_forward_pre_hook(watch(linear)) for linear in linears]
    try:
        forward()
    finally:
        for handle in handles:
            handle.remove()
    return list(arrivals.values())
