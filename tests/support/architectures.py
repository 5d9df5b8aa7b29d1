"""A tiny configuration of every architecture of transformers that Secateur was tried on."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import torch
import transformers as t
from torch import nn
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from zoo import LINEAR_ATTENTION, LOCAL, MAMBA, SEEING, SETTINGS, SIZES, SLIDING, class_of
from zoo import config_of as zoo_config

MIXTURE: dict[str, Any] = {"num_experts_per_tok": 2, "moe_intermediate_size": 24}
DEEPSEEK: dict[str, Any] = {
    "q_lora_rank": 16, "kv_lora_rank": 8, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8,
    "v_head_dim": 8, "n_routed_experts": 4, "n_group": 1, "topk_group": 1, "n_shared_experts": 1,
    "first_k_dense_replace": 1, "num_key_value_heads": 4, **MIXTURE,
}  # fmt: skip
SPEECH: dict[str, Any] = {
    "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48,
    "vocab_size": 96, "max_target_positions": 64, "max_source_positions": 32, "num_mel_bins": 8,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "decoder_start_token_id": 1,
}  # fmt: skip

PLAIN = [
    "arcee", "bloom", "cohere", "cohere2", "diffllama", "ernie4_5", "exaone4", "falcon", "gemma2",
    "gemma3_text", "glm4", "gpt2", "gpt_neox", "gptj", "granite", "hunyuan_v1_dense", "llama",
    "mistral", "nemotron", "olmo2", "olmo3", "opt", "persimmon", "phi", "phi3", "qwen2", "qwen3",
    "seed_oss", "smollm3", "stablelm", "starcoder2", "xglm",
]  # fmt: skip
"""Decoders whose layers are all of one kind, but for their masks."""

EXTRA: dict[str, dict[str, Any]] = {
    "bloom": {"n_layer": 3, "n_head": 4},
    "cohere2": {"layer_types": SLIDING, "sliding_window": 8},
    "ernie4_5": {"head_dim": 8},
    "exaone4": {"layer_types": SLIDING, "sliding_window": 8},
    "gemma2": LOCAL,
    "glm4": {"head_dim": 8},
    "gptj": {"rotary_dim": 8, "n_layer": 3, "n_head": 4, "n_embd": 32, "n_positions": 64},
    "gpt2": {"n_layer": 3, "n_head": 4, "n_embd": 32, "n_positions": 64},
    "hunyuan_v1_dense": {"head_dim": 8},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 16},
    "olmo3": {"layer_types": SLIDING, "sliding_window": 8},
    "phi3": {},
    "qwen3": {"head_dim": 8},
    "xglm": {"d_model": 32, "ffn_dim": 48, "num_layers": 3, "attention_heads": 4},
    # layers of several kinds
    "granitemoehybrid": {
        **MAMBA, "layer_types": ["mamba", "attention", "mamba"], "num_local_experts": 4,
        "num_experts_per_tok": 2, "shared_intermediate_size": 40,
    },
    "zamba2": {
        "num_hidden_layers": 5, "mamba_d_state": 8, "mamba_expand": 2, "mamba_ngroups": 1,
        "layers_block_type": ["mamba", "hybrid", "mamba", "hybrid", "mamba"],
        "n_mamba_heads": 8, "mamba_headdim": 8, "chunk_size": 8, "num_mem_blocks": 1,
        "use_mem_rope": True, "adapter_rank": 4,
        "num_key_value_heads": 4, "attention_head_dim": 16, "attention_hidden_size": 64,
    },
    "jamba": {
        "attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2,
        "expert_layer_offset": 1, "num_experts": 4, "num_experts_per_tok": 2,
        "mamba_d_state": 8, "mamba_dt_rank": 4, "use_mamba_kernels": False,
    },
    "qwen3_next": {**LINEAR_ATTENTION, **MIXTURE, "num_experts": 4,
                   "shared_expert_intermediate_size": 40},
    "minimax": {
        "head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2, "block_size": 8,
        "layer_types": ["linear_attention", "full_attention", "linear_attention"],
    },
    # mixtures of experts
    "mixtral": {"num_experts_per_tok": 2, "num_local_experts": 5},
    "qwen2_moe": {**MIXTURE, "num_experts": 5, "shared_expert_intermediate_size": 40},
    "qwen3_moe": {**MIXTURE, "num_experts": 5, "head_dim": 8},
    "deepseek_v2": {**DEEPSEEK, "topk_method": "greedy", "head_dim": 8},
    "deepseek_v3": {**DEEPSEEK, "head_dim": 8},
    "glm4_moe": {**MIXTURE, "n_routed_experts": 4, "n_group": 1, "topk_group": 1, "head_dim": 8,
                 "first_k_dense_replace": 1},
    "lfm2_moe": {**MIXTURE, "num_experts": 4, "num_dense_layers": 1,
                 "layer_types": ["conv", "full_attention", "conv"]},
    "gpt_oss": {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 8},
    "granitemoe": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "olmoe": {"num_experts": 4, "num_experts_per_tok": 2},
    "phimoe": {"num_local_experts": 4, "num_experts_per_tok": 2},
    # not decoders, or not only
    "bert": {},
    "roberta": {},
    "bert decoder": {"is_decoder": True},
    "whisper": SPEECH,
    "bart": {**SPEECH, "max_position_embeddings": 64},
    "t5": {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4},
}  # fmt: skip
"""What each needs besides the sizes of `zoo`; a word after the name tells variants apart."""

EXTRA |= {
    name: more
    for name, more in SETTINGS.items()
    if name.split()[0] in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
}
"""The others are decoders inside only: transformers has no causal language model of them."""


def names() -> list[str]:
    """All architectures, by `model_type` and variant."""
    return list(dict.fromkeys([*PLAIN, *EXTRA, *SEEING]))


def config_of(name: str) -> Any:
    """The tiny configuration of an architecture."""
    model_type = name.split()[0]
    if name in SEEING:
        return zoo_config(name)
    return t.AutoConfig.for_model(model_type, **deepcopy({**SIZES, **EXTRA.get(name, {})}))


def tiny_architecture(name: str, seed: int = 0) -> nn.Module:
    """A randomly initialised model of an architecture, in float32."""
    torch.manual_seed(seed)
    config = config_of(name)
    return class_of(config).from_config(config, dtype=torch.float32).eval()
