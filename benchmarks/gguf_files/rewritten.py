"""Architectures without a class in transformers: the tensors of another, under their own names."""

from __future__ import annotations

import re
from typing import Any

import torch

State = dict[str, torch.Tensor]
Config = dict[str, Any]
COUNTS = ("num_local_experts", "num_experts_per_tok")


def grovemoe(state: State, config: Config) -> tuple[State, Config]:
    """Qwen3-MoE with a small further expert for each two neighbours."""
    generator = torch.Generator().manual_seed(2)
    inner, hidden = config["head_dim"], config["hidden_size"]
    found = dict(state)
    for layer in range(config["num_hidden_layers"]):
        for expert in range(config["num_local_experts"] // 2):
            for name, shape in (
                ("gate_proj", (inner, hidden)),
                ("up_proj", (inner, hidden)),
                ("down_proj", (hidden, inner)),
            ):
                key = f"model.layers.{layer}.mlp.chunk_experts.{expert}.{name}.weight"
                found[key] = 0.05 * torch.randn(shape, generator=generator)
    return found, config | {"architectures": ["GroveMoeForCausalLM"], "model_type": "grove_moe"}


def smallthinker(state: State, config: Config) -> tuple[State, Config]:
    """Qwen3-MoE without norms of queries and keys."""
    found = {}
    for name, tensor in state.items():
        if not re.search(r"\.[qk]_norm\.", name):
            name = name.replace("mlp.gate.", "block_sparse_moe.primary_router.")
            name = re.sub(r"mlp(\.experts\.\d+\.\w+)_proj", r"block_sparse_moe\1", name)
            found[name] = tensor
    own = {name: value for name, value in config.items() if name not in COUNTS}
    return found, own | {
        "architectures": ["SmallThinkerForCausalLM"],
        "model_type": "smallthinker",
        "moe_num_primary_experts": config["num_local_experts"],
        "moe_num_active_primary_experts": config["num_experts_per_tok"],
        "moe_ffn_hidden_size": config["moe_intermediate_size"],
        "moe_primary_router_apply_softmax": True,
    }


def bailingmoe2(state: State, config: Config) -> tuple[State, Config]:
    """GLM4-MoE with one tensor for queries, keys and values, and the names of Ling 2."""
    renamed = {
        "model.embed_tokens": "model.word_embeddings",
        "self_attn.o_proj": "attention.dense",
        "self_attn.q_norm": "attention.query_layernorm",
        "self_attn.k_norm": "attention.key_layernorm",
        "gate.e_score_correction_bias": "gate.expert_bias",
    }
    found: State = {}
    for name, tensor in state.items():
        if re.search(r"self_attn\.[kv]_proj", name):
            continue
        if "self_attn.q_proj" in name:
            tensor = torch.cat([state[name.replace("q_proj", f"{x}_proj")] for x in "qkv"])
            name = name.replace("self_attn.q_proj", "attention.query_key_value")
        for old, new in renamed.items():
            name = name.replace(old, new)
        if name.endswith("shared_head.norm.weight"):
            name = name.replace("shared_head.norm", "final_layernorm")
        found[name] = tensor
    own = {x: y for x, y in config.items() if x not in ("n_routed_experts", "n_shared_experts")}
    return found, own | {
        "architectures": ["BailingMoeV2ForCausalLM"],
        "model_type": "bailing_moe_v2",
        "num_experts": config["n_routed_experts"],
        "num_shared_experts": config["n_shared_experts"],
        "score_function": "sigmoid",
    }
