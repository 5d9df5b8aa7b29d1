"""A tiny configuration of every architecture that was tried: those of `zoo`, and others."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import torch
import transformers as t
from torch import nn
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from zoo import CONFIGS, DENSE, MIXTURES, SEEING, SETTINGS, SIZES, class_of, with_routes
from zoo import config_of as zoo_config

SPEECH: dict[str, Any] = {
    "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48,
    "vocab_size": 96, "max_target_positions": 64, "max_source_positions": 32, "num_mel_bins": 8,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "decoder_start_token_id": 1,
}  # fmt: skip

OTHERS: dict[str, dict[str, Any]] = {
    "diffllama": {},
    "hunyuan_v1_dense": {"head_dim": 8},
    "persimmon": {},
    "xglm": {"d_model": 32, "ffn_dim": 48, "num_layers": 3, "attention_heads": 4},
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
    "minimax": {
        "head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2, "block_size": 8,
        "layer_types": ["linear_attention", "full_attention", "linear_attention"],
    },
    # not decoders, or not only
    "bert": {},
    "roberta": {},
    "bert decoder": {"is_decoder": True},
    "whisper": SPEECH,
    "bart": {**SPEECH, "max_position_embeddings": 64},
    "t5": {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4},
}  # fmt: skip
"""What each needs besides the sizes of `zoo`; a word after the name tells variants apart."""


def names() -> list[str]:
    """All architectures, by `model_type` and variant.

    Without decoders of which transformers has no causal language model.
    """
    known = [*CONFIGS, *DENSE, *MIXTURES, *SETTINGS]
    causal = [name for name in known if name.split()[0] in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES]
    return [*dict.fromkeys([*causal, *OTHERS, *SEEING])]


def config_of(name: str) -> Any:
    """The tiny configuration of an architecture."""
    if name not in OTHERS:
        return zoo_config(name)
    return t.AutoConfig.for_model(name.split()[0], **deepcopy({**SIZES, **OTHERS[name]}))


def tiny_architecture(name: str, seed: int = 0) -> nn.Module:
    """A randomly initialised model of an architecture, in float32."""
    torch.manual_seed(seed)
    config = config_of(name)
    return with_routes(class_of(config).from_config(config, dtype=torch.float32).eval())
