"""Minitron's scores of channels, from the tensors that norms hand to the sub-blocks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

NORMS = ("input_layernorm", "post_attention_layernorm")
READS: dict[str, tuple[str, ...]] = {
    "gpt2": ("ln_1", "ln_2"),
    "opt": ("self_attn_layer_norm", "final_layer_norm"),
    "gemma2": ("input_layernorm", "pre_feedforward_layernorm"),
    "gemma3": ("input_layernorm", "pre_feedforward_layernorm"),
}
"""The norms of a layer whose outputs a sub-block reads, where they are not NORMS."""

UNNORMED = {"olmo2": ("self_attn", "mlp")}
"""Sub-blocks that read the residual stream itself."""


def channel_scores(model: Any, family: str, layers: Any, windows: Tensor) -> Tensor:
    """Σ over the reads of all layers of the L2 norm of each channel over all tokens."""
    reads: list[list[Tensor]] = []

    def keep(place: list[Tensor], tensor: Tensor) -> None:
        place.append(tensor.detach().flatten(0, -2).double())

    def watch(module: Any, *, output: bool) -> Any:
        place: list[Tensor] = []
        reads.append(place)
        if output:
            return module.register_forward_hook(lambda _, args, out: keep(place, out))
        return module.register_forward_pre_hook(
            lambda _, args, named: keep(place, args[0] if args else named["hidden_states"]),
            with_kwargs=True,
        )

    handles = []
    for layer in layers:
        for name in UNNORMED.get(family, READS.get(family, NORMS)):
            module = layer.get_submodule(name)
            handles.append(watch(module, output=family not in UNNORMED))
    with torch.no_grad():
        for window in windows:
            model(input_ids=window[None])
    for handle in handles:
        handle.remove()
    return sum(torch.cat(place).square().sum(0).sqrt() for place in reads).float()
