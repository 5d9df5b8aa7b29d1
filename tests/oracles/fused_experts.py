"""Experts taken out of the fused tensors by hand, as the forwards of transformers use them.

Written from the modelling files of transformers, one function for each form. Nothing here reads
`secateur`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

Taken = dict[str, Tensor]
"""Gate, up and down of one expert as [out, in], views of the fused tensors, and biases."""


def standard(x: Any, e: int) -> Taken:
    """`F.linear(x, gate_up_proj[e]).chunk(2)`, `F.linear(…, down_proj[e])`."""
    half = x.down_proj.shape[2]
    gate_up = x.gate_up_proj[e]
    return {"gate_proj": gate_up[:half], "up_proj": gate_up[half:], "down_proj": x.down_proj[e]}


def gpt_oss(x: Any, e: int) -> Taken:
    """`x @ gate_up_proj[e] + bias`, gate in even columns; `x @ down_proj[e] + bias`."""
    gate_up, bias = x.gate_up_proj[e], x.gate_up_proj_bias[e]
    return {
        "gate_proj": gate_up[:, 0::2].T, "up_proj": gate_up[:, 1::2].T,
        "down_proj": x.down_proj[e].T, "gate_bias": bias[0::2], "up_bias": bias[1::2],
        "down_bias": x.down_proj_bias[e],
    }  # fmt: skip


def llama4(x: Any, e: int) -> Taken:
    """`bmm(x, gate_up_proj).chunk(2)`, `bmm(…, down_proj)`."""
    half = x.down_proj.shape[1]
    gate_up = x.gate_up_proj[e]
    return {
        "gate_proj": gate_up[:, :half].T, "up_proj": gate_up[:, half:].T,
        "down_proj": x.down_proj[e].T,
    }  # fmt: skip


def nemotron_h(x: Any, e: int) -> Taken:
    """`F.linear(act(F.linear(x, up_proj[e])), down_proj[e])`."""
    return {"up_proj": x.up_proj[e], "down_proj": x.down_proj[e]}


TAKEN: Mapping[str, Callable[[Any, int], Taken]] = {
    "gpt_oss": gpt_oss, "llama4": llama4, "nemotron_h": nemotron_h,
}  # fmt: skip


def between(family: str, taken: Taken, x: Tensor, config: Any) -> Tensor:
    """The neurons of an expert, the input of its down."""

    def out(name: str) -> Tensor:
        bias = taken.get(f"{name}_bias")
        return x @ taken[f"{name}_proj"].T + (0 if bias is None else bias)

    if family == "nemotron_h":
        return torch.relu(out("up")).square()
    gate, up = out("gate"), out("up")
    if family in ("gpt_oss", "minimax_m3"):
        limit, alpha = config.swiglu_limit, config.swiglu_alpha
        gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
        return (up + 1) * gate * torch.sigmoid(gate * alpha)
    if family == "step3p7 experts":  # the last layer's limit
        limit = config.text_config.swiglu_limits[-1]
        return nn.functional.silu(gate).clamp(max=limit) * up.clamp(-limit, limit)
    if family == "gemma4":
        return nn.functional.gelu(gate, approximate="tanh") * up
    return nn.functional.silu(gate) * up


def seen_by(family: str, model: nn.Module, path: str, windows: Tensor) -> list[Tensor]:
    """The inputs [tokens, in] of each expert of a module in a plain forward."""
    experts: Any = model.get_submodule(path)
    found: list[Tensor] = []

    def note(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        count = len(experts.down_proj)
        if family == "llama4":  # all tokens for each expert; those of other experts are zero
            every = args[0].view(count, -1, args[0].shape[-1])
            found.extend(rows[rows.abs().sum(-1) > 0] for rows in every)
            return
        for e in range(count):
            found.append(torch.stack([x for x, best in zip(*args[:2], strict=True) if e in best])
                         if (args[1] == e).any() else args[0][:0])  # fmt: skip

    handle = experts.register_forward_pre_hook(note)
    with torch.no_grad():
        model(windows, use_cache=False)
    handle.remove()
    return found


def wanda(weight: Tensor, x: Tensor) -> None:
    """Zero the half of each row with the smallest |w| · ‖x_j‖, in place."""
    norm = x.double().square().sum(0).sqrt()
    for row in weight:
        order = torch.argsort(row.double().abs() * norm, stable=True)
        row[order[: len(row) // 2]] = 0


def prune(family: str, model: nn.Module, path: str, windows: Tensor) -> list[int]:
    """Prune the experts of a module by Wanda on dense inputs; how many tokens each received."""
    experts: Any = model.get_submodule(path)
    inputs = seen_by(family, model, path, windows)
    config: Any = model.config
    with torch.no_grad():
        for e, x in enumerate(inputs):
            if not len(x):
                continue
            taken = TAKEN.get(family, standard)(experts, e)
            neurons = between(family, taken, x, config)
            for name in ("gate_proj", "up_proj"):
                if name in taken:
                    wanda(taken[name], x)
            wanda(taken["down_proj"], neurons)
    return [len(x) for x in inputs]
