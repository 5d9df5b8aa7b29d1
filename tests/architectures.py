"""A tiny configuration of every architecture of transformers that Secateur was tried on."""

from __future__ import annotations

from typing import Any

import torch
import transformers as t
from torch import nn

from zoo import LOCAL, SIZES

MIXTURE: dict[str, Any] = {"num_experts_per_tok": 2, "moe_intermediate_size": 24}
MAMBA: dict[str, Any] = {
    "mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_n_groups": 1,
    "mamba_d_conv": 4, "mamba_expand": 2, "mamba_chunk_size": 8,
}  # fmt: skip
DEEPSEEK: dict[str, Any] = {
    "q_lora_rank": 16, "kv_lora_rank": 8, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8,
    "v_head_dim": 8, "n_routed_experts": 4, "n_group": 1, "topk_group": 1, "n_shared_experts": 1,
    "first_k_dense_replace": 1, "num_key_value_heads": 4, **MIXTURE,
}  # fmt: skip
LINEAR_ATTENTION: dict[str, Any] = {
    "head_dim": 8, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
    "linear_num_key_heads": 2, "linear_num_value_heads": 4,
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
}  # fmt: skip
VISION: dict[str, Any] = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
    "image_size": 16, "patch_size": 8,
}  # fmt: skip
SLIDING = ["sliding_attention", "full_attention", "sliding_attention"]
SPEECH: dict[str, Any] = {
    "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48,
    "vocab_size": 96, "max_target_positions": 64, "max_source_positions": 32, "num_mel_bins": 8,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "decoder_start_token_id": 1,
}  # fmt: skip

GEMMA4: dict[str, Any] = {
    **LOCAL, "layer_types": SLIDING, "global_head_dim": 8, "hidden_size_per_layer_input": 0,
    "num_kv_shared_layers": 0,
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
    "gemma3_text": {**LOCAL, "layer_types": SLIDING},
    "gemma4_text": GEMMA4,
    "gemma4_text small": {
        **GEMMA4, "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 96,
    },
    "gemma3n_text": {
        **LOCAL, "layer_types": SLIDING, "hidden_size_per_layer_input": 8,
        "vocab_size_per_layer_input": 96, "num_kv_shared_layers": 0, "laurel_rank": 4,
        "activation_sparsity_pattern": [0.0] * 3,
    },
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
    "qwen3_5_text": LINEAR_ATTENTION,
    "lfm2": {
        "layer_types": ["conv", "full_attention", "conv"], "block_auto_adjust_ff_dim": False,
    },
    "recurrent_gemma": {
        "num_hidden_layers": 4, "lru_width": 32, "attention_window_size": 8, "head_dim": 8,
        "block_types": ["recurrent", "recurrent", "attention"],
    },
    "mamba": {"state_size": 8, "expand": 2, "time_step_rank": 4},
    "mamba2": {"state_size": 8, "expand": 2, "num_heads": 8, "head_dim": 8, "n_groups": 1,
               "chunk_size": 8},
    "falcon_h1": {**MAMBA, "mamba_d_ssm": 64},
    "bamba": {**MAMBA, "attn_layer_indices": [1]},
    "granitemoehybrid": {
        **MAMBA, "layer_types": ["mamba", "attention", "mamba"], "num_local_experts": 4,
        "num_experts_per_tok": 2, "shared_intermediate_size": 40,
    },
    "granitemoehybrid dense": {
        **MAMBA, "layer_types": ["mamba", "attention", "mamba"], "num_local_experts": 0,
        "num_experts_per_tok": 0, "shared_intermediate_size": 40,
    },
    "zamba2": {
        "num_hidden_layers": 5, "mamba_d_state": 8, "mamba_expand": 2, "mamba_ngroups": 1,
        "layers_block_type": ["mamba", "hybrid", "mamba", "hybrid", "mamba"],
        "n_mamba_heads": 8, "mamba_headdim": 8, "chunk_size": 8, "num_mem_blocks": 1,
        "use_mem_rope": True, "adapter_rank": 4,
        "num_key_value_heads": 4, "attention_head_dim": 16, "attention_hidden_size": 64,
    },
    "nemotron_h": {
        "layers_block_type": ["mamba", "attention", "mlp", "mamba"], "num_hidden_layers": 4,
        "ssm_state_size": 8, "mamba_num_heads": 8, "mamba_head_dim": 8, "n_groups": 1,
        "chunk_size": 8, "head_dim": 8, "expand": 2,
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
    "llama4_text": {"num_local_experts": 4, "num_experts_per_tok": 1, "head_dim": 8,
                    "intermediate_size_mlp": 48, "interleave_moe_layer_step": 1},
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


def with_vision(text: str, vision: str, **more: Any) -> dict[str, Any]:
    """The parts of a model that sees: a text configuration and a vision configuration."""
    return {
        "text_config": {**SIZES, **EXTRA.get(text, {}), "model_type": text},
        "vision_config": {**VISION, "model_type": vision},
        **more,
    }


SEEING: dict[str, dict[str, Any]] = {
    "gemma3": with_vision(
        "gemma3_text", "siglip_vision_model", mm_tokens_per_image=4, image_token_index=90,
        boi_token_index=91, eoi_token_index=92,
    ),
    "gemma4": with_vision("gemma4_text", "gemma4_vision", image_token_id=90),
    "gemma3n": with_vision("gemma3n_text", "gemma3n_vision"),
    "qwen3_5": with_vision("qwen3_5_text", "qwen3_5", image_token_id=90),
    "llava": with_vision("llama", "clip_vision_model", image_token_index=90),
    "mistral3": with_vision("mistral", "pixtral", image_token_index=90),
    "qwen2_5_vl": with_vision("qwen2_5_vl_text", "qwen2_5_vl", image_token_id=90),
    "qwen3_vl": with_vision("qwen3_vl_text", "qwen3_vl", image_token_id=90),
    "smolvlm": with_vision("llama", "smolvlm_vision", image_token_id=90),
    "llama4": with_vision("llama4_text", "llama4_vision_model", image_token_index=90),
}  # fmt: skip


def names() -> list[str]:
    """All architectures, by `model_type` and variant."""
    return list(dict.fromkeys([*PLAIN, *EXTRA, *SEEING]))


def config_of(name: str) -> Any:
    """The tiny configuration of an architecture."""
    model_type = name.split()[0]
    if name in SEEING:
        return t.AutoConfig.for_model(model_type, **SEEING[name])
    return t.AutoConfig.for_model(model_type, **{**SIZES, **EXTRA.get(name, {})})


def tiny_architecture(name: str, seed: int = 0) -> nn.Module:
    """A randomly initialised model of an architecture, in float32."""
    torch.manual_seed(seed)
    return t.AutoModelForCausalLM.from_config(config_of(name), dtype=torch.float32).eval()
