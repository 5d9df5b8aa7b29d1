"""Mixtures of experts, token by token, on the fused tensors that transformers holds."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

Prune = Callable[[Tensor, Tensor], Tensor]
"""A matrix [out, in] and its inputs [tokens, in], float64: the pruned matrix."""


def inputs_of(model: nn.Module, paths: list[str], windows: Tensor) -> dict[str, Tensor]:
    """Inputs [tokens, in] of some modules in a plain forward of the whole model."""
    seen: dict[str, Tensor] = {}
    modules = dict(model.named_modules())

    def note(path: str) -> Callable[..., None]:
        def before(module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Any]) -> None:
            x = args[0] if args else kwargs["hidden_states"]
            seen[path] = x.reshape(-1, x.shape[-1])

        return before

    handles = [modules[p].register_forward_pre_hook(note(p), with_kwargs=True) for p in paths]
    with torch.no_grad():
        model(input_ids=windows, use_cache=False)
    for handle in handles:
        handle.remove()
    return seen


def route(block: Any, x: Tensor, top_k: int, normalised: bool) -> list[list[tuple[int, float]]]:
    """For each token, the experts it is sent to and their weights."""
    logits = x @ block.gate.weight.data.T
    found = []
    for row in logits.double():
        chances = torch.exp(row) / torch.exp(row).sum()
        best = sorted(range(len(row)), key=lambda j: -float(chances[j]))[:top_k]
        total = sum(float(chances[j]) for j in best) if normalised else 1.0
        found.append([(j, float(chances[j]) / total) for j in best])
    return found


def matrices_of(block: Any, expert: int) -> tuple[Tensor, Tensor, Tensor]:
    """Gate, up and down of one expert, views of the fused tensors."""
    gate_up, down = block.experts.gate_up_proj.data, block.experts.down_proj.data
    half = gate_up.shape[1] // 2
    return gate_up[expert, :half], gate_up[expert, half:], down[expert]


def between(gate: Tensor, up: Tensor, x: Tensor) -> Tensor:
    """silu(gate x) · up x, the neurons of an expert."""
    g, u = x @ gate.double().T, x @ up.double().T
    return g / (1 + torch.exp(-g)) * u


def prune_experts(
    block: Any, x: Tensor, top_k: int, normalised: bool, prune: Prune, by_group: bool
) -> dict[int, int]:
    """Prune all experts of a block in place; returns how many tokens each has seen.

    An expert without tokens is left. With `by_group`, down sees what pruned gate and up make.
    """
    chosen = route(block, x, top_k, normalised)
    seen = {}
    for expert in range(len(block.experts.down_proj)):
        mine = [t for t, best in enumerate(chosen) if expert in [j for j, _ in best]]
        seen[expert] = len(mine)
        if not mine:
            continue
        inputs = x[mine].double()
        gate, up, down = matrices_of(block, expert)
        dense = between(gate, up, inputs)
        gate.copy_(prune(gate, inputs))
        up.copy_(prune(up, inputs))
        down.copy_(prune(down, between(gate, up, inputs) if by_group else dense))
    return seen


def reap(block: Any, x: Tensor, top_k: int, normalised: bool) -> Iterator[tuple[int, float]]:
    """Of each expert, how many tokens it gets and the mean of g · ‖f‖ over them."""
    chosen = route(block, x, top_k, normalised)
    for expert in range(len(block.experts.down_proj)):
        gate, up, down = matrices_of(block, expert)
        values = []
        for token, best in enumerate(chosen):
            for j, weight in best:
                if j == expert:
                    neurons = between(gate, up, x[token : token + 1].double())
                    out = neurons @ down.double().T
                    values.append(weight * float(out.square().sum().sqrt()))
        yield len(values), sum(values) / len(values) if values else 0.0
