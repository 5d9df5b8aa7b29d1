"""A cut model refitted beside the uncut one by whole forwards and least squares in float64.

Every linear is solved for from what hooks see of two forwards of the whole models, made anew after
each of them: nothing is halted, passed on or summed up.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D


@dataclass
class Seen:
    """What hooks saw of one module: its inputs and its outputs, [tokens, features]."""

    inputs: Tensor
    outputs: Tensor


@torch.no_grad()
def look(model: nn.Module, paths: Sequence[str], windows: Tensor) -> dict[str, Seen]:
    """Inputs and outputs of modules in a plain forward."""
    seen: dict[str, Seen] = {}

    def keep(path: str) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: Any, out: Any) -> None:
            x = args[0] if args else kwargs["hidden_states"]
            out = out[0] if isinstance(out, tuple) else out
            seen[path] = Seen(x.flatten(0, -2).double(), out.flatten(0, -2).double())

        return hook

    handles = [
        model.get_submodule(p).register_forward_hook(keep(p), with_kwargs=True) for p in paths
    ]
    model(input_ids=windows, use_cache=False)
    for handle in handles:
        handle.remove()
    return seen


def matrix(module: Any) -> Tensor:
    """The weight as [out, in]."""
    return module.weight.t() if isinstance(module, Conv1D) else module.weight


def bias(module: Any) -> Tensor:
    """What is added to the outputs."""
    there: Tensor | None = getattr(module, "bias", None)
    return torch.zeros(len(matrix(module))) if there is None else there


@torch.no_grad()
def refit(
    dense: nn.Module,
    cut: nn.Module,
    path: str,
    groups: Sequence[Sequence[str]],
    writers: Sequence[str],
    layers: Sequence[int],
    channels: Sequence[int] | None,
    windows: Tensor,
    damping: float = 0.2,
) -> nn.Module:
    """The cut model with new weights; neither of the two is changed.

    Args:
        dense: the uncut model.
        cut: what is left of it.
        path: of the decoder layers.
        groups: linears of a layer, in the order in which they run.
        writers: those whose outputs are added to the stream, in that order.
        layers: that stayed.
        channels: of the stream that stayed.
        windows: token ids [windows, length].
        damping: λ as a part of the mean of Σ_t x_tj².
    """
    cut = copy.deepcopy(cut)
    total = len(dense.get_submodule(path))  # type: ignore[arg-type]
    stayed = slice(None) if channels is None else torch.tensor(channels)
    for place, index in enumerate(layers):
        following = layers[place + 1] if place + 1 < len(layers) else total
        here, there = f"{path}.{place}", f"{path}.{index}"
        modules = dict(cut.get_submodule(here).named_modules())
        written = [n for n in writers if n in modules]
        for name in (n for group in groups for n in group if n in modules):
            paths = [f"{here}.{n}" for n in ("", *written, name)]
            now = look(cut, [p.rstrip(".") for p in paths], windows)
            paths = [there, f"{there}.{name}", f"{path}.{following - 1}"]
            twins = dict(dense.get_submodule(there).named_modules())
            earlier = []
            if name in written:
                earlier = [n for n in writers[: list(writers).index(name)] if n in twins]
            wanted = look(dense, [*paths, *(f"{there}.{n}" for n in earlier)], windows)
            module, twin = cut.get_submodule(f"{here}.{name}"), dense.get_submodule(paths[1])
            target = wanted[paths[1]].inputs @ matrix(twin).double().t()
            if name in written:
                before = [f"{here}.{n}" for n in written[: written.index(name)]]
                stream = now[here].inputs + sum(now[n].outputs for n in before)
                goal = wanted[there].inputs + sum(wanted[f"{there}.{n}"].outputs for n in earlier)
                goal = goal + target
                if name == written[-1] and following > index + 1 and not mixture(modules):
                    goal = wanted[paths[2]].outputs - bias(twin)
                target = goal[:, stayed] - stream
            elif target.shape[1] > len(matrix(module)):
                target = target[:, stayed]
            x, old = now[f"{here}.{name}"].inputs, matrix(module).double()
            root = (damping * x.square().sum(0).mean()).sqrt()
            tokens = torch.cat([x, root * torch.eye(x.shape[1], dtype=torch.float64)])
            wishes = torch.cat([target, root * old.t()])
            matrix(module).copy_(torch.linalg.lstsq(tokens, wishes).solution.t())
    return cut


def mixture(modules: dict[str, nn.Module]) -> bool:
    """Whether experts write to the stream after the writers that are known."""
    return any("experts" in name for name in modules)
