"""Wanda on a model of any layers, with whole forwards and nothing of the library.

Which matrices share an input is seen anew for every step: they get the same tensor in the same
forward. So nothing is assumed about how one layer resembles another.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


def inputs_in_order(
    model: nn.Module, names: list[str], windows: Tensor
) -> list[tuple[str, Tensor]]:
    """What these matrices receive in one forward of the whole model, in the order they run."""
    seen: list[tuple[str, Tensor]] = []
    modules = dict(model.named_modules())
    handles = [
        modules[n].register_forward_pre_hook(lambda m, args, n=n: seen.append((n, args[0])))
        for n in names
    ]
    with torch.no_grad():
        model(input_ids=windows, use_cache=False)
    for handle in handles:
        handle.remove()
    return seen


def prune_rows(weight: Tensor, x: Tensor, pattern: str) -> None:
    """Zero the half of each row, or two of each four, with the smallest |w| · ‖x‖."""
    norm = x.reshape(-1, x.shape[-1]).double().square().sum(0).sqrt()
    width = 4 if pattern == "2:4" else weight.shape[1]
    for row in weight:
        score = row.double().abs() * norm
        for start in range(0, len(row), width):
            order = torch.argsort(score[start : start + width], stable=True)
            row[start + order[: round(width / 2)]] = 0


def wanda(model: nn.Module, layers: list[list[str]], windows: Tensor, pattern: str) -> set[str]:
    """Prune layer by layer, matrices that share an input together; returns those that ran.

    Args:
        model: pruned in place.
        layers: the names of the matrices of each layer.
        windows: token ids.
        pattern: `unstructured` for half of each row, or `2:4`.
    """
    done: set[str] = set()
    modules = dict(model.named_modules())
    for names in layers:
        while True:
            left = [n for n in names if n not in done]
            seen = inputs_in_order(model, left, windows)
            if not seen:
                break
            for name, x in seen:
                if x is seen[0][1]:
                    weight = modules[name].weight.data
                    stored = weight if isinstance(modules[name], nn.Linear) else weight.t()
                    prune_rows(stored, x, pattern)
                    done.add(name)
    return done
