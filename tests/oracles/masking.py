"""A model with units switched off by hooks, the others untouched: what a cut model must equal.

Names of modules are written out here by family, and nothing of the library is used.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.nn.functional import layer_norm

LAYOUTS: dict[str, tuple[str, str, str, str, str]] = {
    # layers, attention, its last linear, feed-forward, its last linear
    "gpt2": ("transformer.h", "attn", "attn.c_proj", "mlp", "mlp.c_proj"),
    "opt": ("model.decoder.layers", "self_attn", "self_attn.out_proj", "fc2", "fc2"),
    "gpt_neox": ("gpt_neox.layers", "attention", "attention.dense", "mlp", "mlp.dense_4h_to_h"),
    "starcoder2": ("model.layers", "self_attn", "self_attn.o_proj", "mlp", "mlp.c_proj"),
    "phi": ("model.layers", "self_attn", "self_attn.dense", "mlp", "mlp.fc2"),
    "gptj": ("transformer.h", "attn", "attn.out_proj", "mlp", "mlp.fc_out"),
    **dict.fromkeys(
        ("llava", "mistral3", "qwen2_5_vl", "qwen3_vl", "gemma3 vision"),
        ("model.language_model.layers", "self_attn", "self_attn.o_proj", "mlp", "mlp.down_proj"),
    ),
    **dict.fromkeys(
        ("bamba", "falcon_h1"),
        ("model.layers", "self_attn", "self_attn.o_proj", "feed_forward", "feed_forward.down_proj"),
    ),
    "llama4": (
        "model.layers",
        "self_attn",
        "self_attn.o_proj",
        "feed_forward",
        "feed_forward.down_proj",
    ),
    "step3p7 vision": (
        "model.language_model.layers",
        "self_attn",
        "self_attn.o_proj",
        "mlp",
        "mlp.down_proj",
    ),
    **dict.fromkeys(
        ("lfm2", "lfm2_moe"),
        ("model.layers", "self_attn", "self_attn.out_proj", "feed_forward", "feed_forward.w2"),
    ),
    **dict.fromkeys(
        ("granitemoehybrid dense", "granitemoehybrid"),
        (
            "model.layers",
            "self_attn",
            "self_attn.o_proj",
            "shared_mlp",
            "shared_mlp.output_linear",
        ),
    ),
    "nemotron_h dense": ("model.layers", "mixer", "mixer.o_proj", "mixer", "mixer.down_proj"),
    "smolvlm": ("model.text_model.layers", "self_attn", "self_attn.o_proj", "mlp", "mlp.down_proj"),
    **dict.fromkeys(
        ("bloom", "falcon", "falcon new"),
        ("transformer.h", "self_attention", "self_attention.dense", "mlp", "mlp.dense_4h_to_h"),
    ),
}
OVER_ALL_HEADS = ("olmo2", "olmo3", "olmoe", "minimax_m2")
"""Families whose norms of queries and keys run over all heads."""

COMMON = ("model.layers", "self_attn", "self_attn.o_proj", "mlp", "mlp.down_proj")


def switch_off(
    model: nn.Module,
    family: str,
    *,
    layers: tuple[int, ...] | None = None,
    groups: Mapping[int, tuple[int, ...]] | None = None,
    queries: Mapping[int, tuple[int, ...]] | None = None,
    neurons: Mapping[int, tuple[int, ...]] | None = None,
    hidden: tuple[int, ...] | None = None,
) -> None:
    """Put hooks on a model, so that only the units named do anything."""
    path, attention, out, ffn, down = LAYOUTS.get(family, COMMON)
    config: Any = getattr(model.config, "text_config", model.config)
    heads = config.num_attention_heads
    per_group = heads // (getattr(config, "num_key_value_heads", None) or heads)
    sizes = (getattr(config, name, None) for name in ("v_head_dim", "head_dim"))
    size = next(filter(None, sizes), config.hidden_size // heads)
    for i, layer in enumerate(model.get_submodule(path)):
        if layers is not None and i not in layers:
            layer.register_forward_hook(unchanged, with_kwargs=True)
        kept = (groups or {}).get(i)
        if kept == ():
            layer.get_submodule(attention).register_forward_hook(
                lambda m, args, result: (torch.zeros_like(result[0]), *result[1:])
            )
        elif kept is not None:
            wide = [g * per_group * size + c for g in kept for c in range(per_group * size)]
            keep_inputs(layer.get_submodule(out), wide)
            if family in OVER_ALL_HEADS:  # that are left
                narrow = [g * size + c for g in kept for c in range(size)]
                narrow_norm(layer.get_submodule("self_attn.q_norm"), wide)
                narrow_norm(layer.get_submodule("self_attn.k_norm"), narrow)
        if (kept := (queries or {}).get(i)) is not None:
            wide = [h * size + c for h in kept for c in range(size)]
            keep_inputs(layer.get_submodule(out), wide)
            if family in OVER_ALL_HEADS:
                narrow_norm(layer.get_submodule("self_attn.q_norm"), wide)
        kept = (neurons or {}).get(i)
        if kept == ():
            layer.get_submodule(ffn).register_forward_hook(
                lambda m, args, result: torch.zeros_like(result)
            )
        elif kept is not None:
            keep_inputs(layer.get_submodule(down), list(kept))
        if hidden is not None:
            keep_outputs(layer.get_submodule(out), list(hidden))
            keep_outputs(layer.get_submodule(down), list(hidden))
    if hidden is not None:
        narrow_stream(model, config.hidden_size, list(hidden))


def unchanged(module: nn.Module, args: Any, kwargs: Any, result: Any) -> Any:
    """The layer's input in the form of its output."""
    hidden = args[0] if args else kwargs["hidden_states"]
    return (hidden, *result[1:]) if isinstance(result, tuple) else hidden


def narrow_stream(model: nn.Module, size: int, kept: list[int]) -> None:
    """Only these channels of the residual stream carry anything; LayerNorms see no others."""
    for name, module in model.named_modules():
        if isinstance(module, nn.LayerNorm) or "LayerNorm" in type(module).__name__:
            module.register_forward_hook(lambda m, args, result: norm_of(m, args[0], kept))
        elif name.endswith("project_in") or (
            isinstance(module, nn.Embedding) and module.embedding_dim == size
        ):
            keep_outputs(module, kept)


def norm_of(module: Any, x: torch.Tensor, kept: list[int]) -> torch.Tensor:
    """A LayerNorm over these entries alone; Nemotron's adds one to its weight, Cohere's is bare."""
    weight = module.weight + 1 if type(module).__name__.endswith("1P") else module.weight
    bias = getattr(module, "bias", None)
    eps = getattr(module, "eps", None) or module.variance_epsilon
    result = torch.zeros_like(x)
    result[..., kept] = layer_norm(
        x[..., kept], (len(kept),), weight[kept], None if bias is None else bias[kept], eps
    )
    return result


def narrow_norm(module: Any, kept: list[int]) -> None:
    """An RMSNorm over these entries alone."""

    def norm(m: Any, args: Any, result: torch.Tensor) -> torch.Tensor:
        x = args[0][..., kept]
        root = (x.square().mean(-1, keepdim=True) + m.variance_epsilon).sqrt()
        normed = torch.zeros_like(result)
        normed[..., kept] = m.weight[kept] * x / root
        return normed

    module.register_forward_hook(norm)


def keep_inputs(module: nn.Module, kept: list[int]) -> None:
    module.register_forward_pre_hook(lambda m, args: (only(args[0], kept), *args[1:]))


def keep_outputs(module: nn.Module, kept: list[int]) -> None:
    module.register_forward_hook(lambda m, args, result: only(result, kept))


def only(x: torch.Tensor, kept: list[int]) -> torch.Tensor:
    result = torch.zeros_like(x)
    result[..., kept] = x[..., kept]
    return result


WRITERS = ("o_proj", "out_proj", "down_proj", "dense", "c_proj", "w2", "output_linear")
"""The last names of what writes to the residual stream; of experts it is one tensor for all."""


@torch.no_grad()
def narrow_weights(model: nn.Module, size: int, kept: list[int]) -> None:
    """Only these channels of the residual stream carry anything: nothing writes to the others.

    For models whose norms are RMSNorms, and whose writers are those in `WRITERS`.
    """
    gone = [channel for channel in range(size) if channel not in kept]
    for name, parameter in model.named_parameters():
        parts = name.removesuffix(".weight").removesuffix(".bias").split(".")
        leaf = parts[-1].removesuffix("_bias")
        if "embed_tokens" in name:
            parameter[:, gone] = 0
        elif leaf in WRITERS:
            fused = 1 if parameter.ndim == 3 and parameter.shape[1] == size else 2
            axis = {1: 0, 2: int("experts" in parts), 3: fused}[parameter.ndim]
            parameter.index_fill_(axis, torch.tensor(gone), 0)
