"""A tiny model of every family, built from its configuration in milliseconds."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import torch
import transformers as t
from torch import nn
from transformers.pytorch_utils import Conv1D

from secateur.models.architecture import describe, linears_of

SIZES: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
WITHOUT_GQA = {k: v for k, v in SIZES.items() if k != "num_key_value_heads"}
LOCAL = {"head_dim": 8, "sliding_window": 8, "query_pre_attn_scalar": 8}

CONFIGS: dict[str, Any] = {
    "llama": lambda: t.LlamaConfig(**SIZES, tie_word_embeddings=True, attention_bias=True),
    "mistral": lambda: t.MistralConfig(**SIZES, sliding_window=8),
    "qwen2": lambda: t.Qwen2Config(**SIZES),
    "qwen3": lambda: t.Qwen3Config(**SIZES, head_dim=8),
    "gemma2": lambda: t.Gemma2Config(**SIZES, **LOCAL),
    "gemma3": lambda: t.Gemma3TextConfig(
        **SIZES,
        **LOCAL,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
    ),
    "phi3": lambda: t.Phi3Config(**SIZES),
    "gpt2": lambda: t.GPT2Config(
        vocab_size=96, n_embd=32, n_layer=3, n_head=4, n_positions=64, bos_token_id=1,
        eos_token_id=2,
    ),
    "opt": lambda: t.OPTConfig(
        vocab_size=96, hidden_size=32, ffn_dim=48, num_hidden_layers=3, num_attention_heads=4,
        max_position_embeddings=64, word_embed_proj_dim=16, bos_token_id=1, eos_token_id=2,
        pad_token_id=0,
    ),
    "gpt_neox": lambda: t.GPTNeoXConfig(**WITHOUT_GQA),
    "olmo2": lambda: t.Olmo2Config(**SIZES),
    # Not declared anywhere: the generic description has to find its way.
    "generic": lambda: t.OlmoConfig(**SIZES),
}  # fmt: skip

SLIDING = ["sliding_attention", "full_attention", "sliding_attention"]
WINDOWS: dict[str, Any] = {"sliding_window": 8, "layer_types": SLIDING}
OLD_NAMES: dict[str, Any] = {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64}
FEW_TOKENS: dict[str, Any] = {"vocab_size": 96, "bos_token_id": 1, "eos_token_id": 2}

DENSE: dict[str, Any] = {
    "apertus": lambda: t.ApertusConfig(**SIZES),
    "arcee": lambda: t.ArceeConfig(**SIZES),
    "bloom": lambda: t.BloomConfig(**FEW_TOKENS, hidden_size=32, n_layer=3, n_head=4),
    "cohere": lambda: t.CohereConfig(**SIZES),
    "cohere2": lambda: t.Cohere2Config(**SIZES, **deepcopy(WINDOWS)),
    "ernie4_5": lambda: t.Ernie4_5Config(**SIZES, head_dim=8),
    "cwm": lambda: t.CwmConfig(**SIZES, head_dim=8, **deepcopy(WINDOWS)),
    "exaone": lambda: t.ExaoneConfig(**SIZES),
    "exaone4": lambda: t.Exaone4Config(**SIZES, **deepcopy(WINDOWS)),
    "falcon": lambda: t.FalconConfig(**WITHOUT_GQA, ffn_hidden_size=48),
    "falcon new": lambda: t.FalconConfig(
        **WITHOUT_GQA, ffn_hidden_size=48, num_kv_heads=2, new_decoder_architecture=True
    ),
    "gemma": lambda: t.GemmaConfig(**SIZES, head_dim=8),
    "glm": lambda: t.GlmConfig(**SIZES, head_dim=8),
    "glm4": lambda: t.Glm4Config(**SIZES, head_dim=8),
    "gptj": lambda: t.GPTJConfig(**FEW_TOKENS, **OLD_NAMES, rotary_dim=8),
    "granite": lambda: t.GraniteConfig(
        **SIZES, embedding_multiplier=2.0, attention_multiplier=0.5, residual_multiplier=0.8,
        logits_scaling=2.0,
    ),
    "granite_swa": lambda: t.GraniteSWAConfig(**SIZES, **deepcopy(WINDOWS)),
    "helium": lambda: t.HeliumConfig(**SIZES, head_dim=8),
    "hunyuan": lambda: t.HunYuanDenseV1Config(**SIZES, head_dim=8),
    "internlm3": lambda: t.InternLM3Config(**SIZES, head_dim=8),
    "jais2": lambda: t.Jais2Config(**SIZES),
    "ministral3": lambda: t.Ministral3Config(**SIZES, head_dim=8),
    "nemotron": lambda: t.NemotronConfig(**SIZES, head_dim=8),
    "olmo3": lambda: t.Olmo3Config(**SIZES, **deepcopy(WINDOWS)),
    "phi": lambda: t.PhiConfig(**SIZES),
    "seed_oss": lambda: t.SeedOssConfig(**SIZES, head_dim=8),
    "smollm3": lambda: t.SmolLM3Config(**SIZES, no_rope_layers=[1, 1, 0]),
    "stablelm": lambda: t.StableLmConfig(**SIZES),
    "stablelm parallel": lambda: t.StableLmConfig(**SIZES, use_parallel_residual=True),
    "starcoder2": lambda: t.Starcoder2Config(**SIZES, sliding_window=8),
    "vaultgemma": lambda: t.VaultGemmaConfig(**SIZES, **LOCAL),
}  # fmt: skip
"""Families with a declaration, whose layers are all of one kind."""

MAMBA: dict[str, Any] = {
    "mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_n_groups": 1,
    "mamba_d_conv": 4, "mamba_expand": 2, "mamba_chunk_size": 8,
}  # fmt: skip
LINEAR_ATTENTION: dict[str, Any] = {
    "head_dim": 8, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
    "linear_num_key_heads": 2, "linear_num_value_heads": 4,
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
}  # fmt: skip
VISION: dict[str, Any] = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
    "image_size": 16, "patch_size": 8, "out_hidden_size": 32,
}  # fmt: skip
GEMMA4: dict[str, Any] = {
    **LOCAL, "layer_types": SLIDING, "global_head_dim": 8, "hidden_size_per_layer_input": 0,
    "num_kv_shared_layers": 0,
}  # fmt: skip

BY_TOKEN: dict[str, Any] = {"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 96}
LATE_LAYERS: dict[str, Any] = {
    "num_hidden_layers": 5, "num_kv_shared_layers": 2,
    "layer_types": [*SLIDING, "sliding_attention", "full_attention"],
}  # fmt: skip
"""The last two layers read keys and values of earlier ones."""
GEMMA3N: dict[str, Any] = {
    **LOCAL, **BY_TOKEN, "layer_types": SLIDING, "num_kv_shared_layers": 0, "laurel_rank": 4,
    "activation_sparsity_pattern": [0.0] * 3,
}  # fmt: skip

SETTINGS: dict[str, dict[str, Any]] = {
    "gemma3_text": {**LOCAL, "layer_types": SLIDING},
    "gemma4_text": GEMMA4,
    "gemma4_text small": {**GEMMA4, **BY_TOKEN},
    "gemma4_text shared": {**GEMMA4, **BY_TOKEN, **LATE_LAYERS},
    "gemma3n_text": GEMMA3N,
    "gemma3n_text shared": {
        **GEMMA3N, **LATE_LAYERS, "activation_sparsity_pattern": [0.5, 0.5, 0.0, 0.0, 0.0],
        "intermediate_size": [48, 48, 40, 32, 32],
    },
    "step3p5": {
        **deepcopy(WINDOWS), "head_dim": 8, "mlp_layer_types": ["dense"] * 3, "gating": "per-head",
        "query_pre_attn_scalar": 8,
    },
    "step3p5 experts": {
        **deepcopy(WINDOWS), "head_dim": 8, "mlp_layer_types": ["dense", "sparse", "sparse"],
        "gating": "per-head", "query_pre_attn_scalar": 8, "n_routed_experts": 5,
        "num_experts_per_tok": 2, "moe_intermediate_size": 24, "share_expert_dim": 40,
        "swiglu_limits": [0, 0, 0.5], "moe_router_scaling_factor": 1.5,
    },
    "llama4_text": {"num_local_experts": 4, "num_experts_per_tok": 1, "head_dim": 8,
                    "intermediate_size_mlp": 48, "interleave_moe_layer_step": 1},
    "qwen2_5_vl_text": {
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]},
    },
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
    "granitemoehybrid dense": {
        **MAMBA, "layer_types": ["mamba", "attention", "mamba"], "num_local_experts": 0,
        "num_experts_per_tok": 0, "shared_intermediate_size": 40,
    },
    "nemotron_h dense": {
        "layers_block_type": ["mamba", "attention", "mlp", "mamba"], "num_hidden_layers": 4,
        "ssm_state_size": 8, "mamba_num_heads": 8, "mamba_head_dim": 8, "n_groups": 1,
        "chunk_size": 8, "head_dim": 8, "expand": 2,
    },
}  # fmt: skip
"""What decoders with layers of several kinds, or decoders inside others, need besides the sizes."""


def with_vision(text: str, vision: str, **more: Any) -> dict[str, Any]:
    """The parts of a model that sees: a text configuration and a vision configuration."""
    return {
        "text_config": {**SIZES, **SETTINGS.get(text, {}), "model_type": text.split()[0]},
        "vision_config": {**VISION, "model_type": vision},
        **more,
    }


SEEING: dict[str, dict[str, Any]] = {
    "gemma3 vision": with_vision(
        "gemma3_text", "siglip_vision_model", mm_tokens_per_image=4, image_token_index=90,
        boi_token_index=91, eoi_token_index=92,
    ),
    "gemma4 vision": with_vision("gemma4_text", "gemma4_vision", image_token_id=90),
    "gemma4 vision small": with_vision(
        "gemma4_text shared", "gemma4_vision", image_token_id=90,
    ),
    "step3p7 vision": with_vision("step3p5", "step3p5_vision", image_token_id=90),
    "step3p7 experts": with_vision("step3p5 experts", "step3p5_vision", image_token_id=90),
    "gemma3n vision": with_vision("gemma3n_text", "gemma3n_vision"),
    "qwen3_5 vision": with_vision("qwen3_5_text", "qwen3_5", image_token_id=90),
    "llava": with_vision("llama", "clip_vision_model", image_token_index=90),
    "mistral3": with_vision("mistral", "pixtral", image_token_index=90),
    "qwen2_5_vl": with_vision("qwen2_5_vl_text", "qwen2_5_vl", image_token_id=90),
    "qwen3_vl": with_vision("qwen3_vl_text", "qwen3_vl", image_token_id=90),
    "smolvlm": with_vision("llama", "smolvlm_vision", image_token_id=90),
    "llama4 vision": with_vision("llama4_text", "llama4_vision_model", image_token_index=90),
}  # fmt: skip
"""Models that see: a decoder inside, and a tower for pictures."""

HYBRIDS = (
    "qwen3_5_text", "lfm2", "recurrent_gemma", "mamba", "mamba2", "falcon_h1", "bamba",
    "granitemoehybrid dense", "nemotron_h dense", "gemma4_text", "gemma4_text small",
    "gemma4_text shared", "gemma3n_text", "gemma3n_text shared",
)  # fmt: skip
"""Decoders whose layers are of several kinds, or have more than attention and feed-forward."""

EXPERTS: dict[str, Any] = {"num_experts_per_tok": 2, "num_experts": 5, "moe_intermediate_size": 24}
LOCAL_EXPERTS: dict[str, Any] = {"num_experts_per_tok": 2, "num_local_experts": 5}
GROUPED_EXPERTS: dict[str, Any] = {
    "num_experts_per_tok": 2, "moe_intermediate_size": 24, "n_routed_experts": 6, "n_group": 2,
    "topk_group": 1, "n_shared_experts": 1, "first_k_dense_replace": 1,
}  # fmt: skip
LATENT_ATTENTION: dict[str, Any] = {
    **SIZES, "q_lora_rank": 16, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 8,
    "v_head_dim": 16, "num_key_value_heads": 4,
}  # fmt: skip
INDEXER: dict[str, Any] = {"index_n_heads": 2, "index_head_dim": 8, "index_topk": 64}
SPARSE_LINEAR: dict[str, Any] = {**LINEAR_ATTENTION, "shared_expert_intermediate_size": 40}

MIXTURES: dict[str, Any] = {
    "mixtral": lambda: t.MixtralConfig(**SIZES, **LOCAL_EXPERTS),
    "qwen2_moe": lambda: t.Qwen2MoeConfig(
        **SIZES, **EXPERTS, shared_expert_intermediate_size=40, mlp_only_layers=[1],
    ),
    "qwen3_moe": lambda: t.Qwen3MoeConfig(
        **SIZES, **EXPERTS, head_dim=8, norm_topk_prob=True, decoder_sparse_step=2,
    ),
    "olmoe": lambda: t.OlmoeConfig(**SIZES, num_experts=5, num_experts_per_tok=2),
    "qwen3_next": lambda: t.Qwen3NextConfig(**SIZES, **EXPERTS, **SPARSE_LINEAR),
    "qwen3_5_moe": lambda: t.Qwen3_5MoeTextConfig(**SIZES, **EXPERTS, **SPARSE_LINEAR),
    "gpt_oss": lambda: t.GptOssConfig(
        **SIZES, **LOCAL_EXPERTS, head_dim=8, sliding_window=8, layer_types=[*SLIDING],
    ),
    "llama4": lambda: t.Llama4TextConfig(
        **SIZES, num_experts_per_tok=1, num_local_experts=5, head_dim=8, intermediate_size_mlp=40,
        interleave_moe_layer_step=2,
    ),
    "glm4_moe": lambda: t.Glm4MoeConfig(**SIZES, **GROUPED_EXPERTS, head_dim=8),
    "glm4_moe_lite": lambda: t.Glm4MoeLiteConfig(**LATENT_ATTENTION, **GROUPED_EXPERTS),
    "deepseek_v2": lambda: t.DeepseekV2Config(
        **LATENT_ATTENTION, **GROUPED_EXPERTS, topk_method="group_limited_greedy",
    ),
    "deepseek_v3": lambda: t.DeepseekV3Config(**LATENT_ATTENTION, **GROUPED_EXPERTS),
    "glm_moe_dsa": lambda: t.GlmMoeDsaConfig(**LATENT_ATTENTION, **GROUPED_EXPERTS, **INDEXER),
    "hy_v3": lambda: t.HYV3Config(
        **SIZES, **EXPERTS, head_dim=8, num_shared_experts=1, first_k_dense_replace=1,
    ),
    "deepseek_v4": lambda: t.DeepseekV4Config(
        **{**SIZES, "num_key_value_heads": 1}, **INDEXER, head_dim=16, n_routed_experts=6,
        num_experts_per_tok=2, moe_intermediate_size=24, n_shared_experts=1, q_lora_rank=16,
        o_lora_rank=8, o_groups=2, sliding_window=8, mlp_layer_types=["hash_moe", "moe", "moe"],
    ),
    "dots1": lambda: t.Dots1Config(
        **SIZES, **GROUPED_EXPERTS, head_dim=8, layer_types=["full_attention"] * 3,
    ),
    "minimax_m2": lambda: t.MiniMaxM2Config(**SIZES, **LOCAL_EXPERTS, head_dim=8),
    "minimax_m3": lambda: t.AutoConfig.for_model(
        "minimax_m3_vl_text", **SIZES, **LOCAL_EXPERTS, head_dim=8, shared_intermediate_size=40,
    ),
    "phimoe": lambda: t.PhimoeConfig(**SIZES, **LOCAL_EXPERTS),
    "granitemoe": lambda: t.GraniteMoeConfig(**SIZES, **LOCAL_EXPERTS),
    "granitemoehybrid": lambda: t.GraniteMoeHybridConfig(
        **SIZES, **MAMBA, **LOCAL_EXPERTS, layer_types=["mamba", "attention", "mamba"],
        shared_intermediate_size=40,
    ),
    "nemotron_h": lambda: t.NemotronHConfig(
        **SIZES, layers_block_type=["mamba", "attention", "moe"], ssm_state_size=8,
        mamba_num_heads=8, mamba_head_dim=8, n_groups=1, chunk_size=8, head_dim=8, expand=2,
        n_routed_experts=6, n_group=2, topk_group=1, num_experts_per_tok=2,
        moe_intermediate_size=24, moe_shared_expert_intermediate_size=40, moe_latent_size=16,
    ),
    "lfm2_moe": lambda: t.Lfm2MoeConfig(
        **SIZES, **EXPERTS, num_dense_layers=1, layer_types=["conv", "full_attention", "conv"],
    ),
    "gemma4": lambda: t.Gemma4TextConfig(
        **SIZES, head_dim=8, sliding_window=8, layer_types=[*SLIDING], global_head_dim=8,
        hidden_size_per_layer_input=0, num_kv_shared_layers=0, enable_moe_block=True,
        num_experts=5, top_k_experts=2, moe_intermediate_size=24,
    ),
    "ernie4_5_moe": lambda: t.Ernie4_5_MoeConfig(
        **SIZES, moe_num_experts=5, moe_k=2, moe_intermediate_size=24, moe_layer_start_index=1,
        moe_num_shared_experts=1, head_dim=8,
    ),
    "hunyuan_v1_moe": lambda: t.AutoConfig.for_model(
        "hunyuan_v1_moe", **SIZES, num_experts=5, moe_topk=2, head_dim=8,
    ),
}  # fmt: skip
"""Families whose feed-forward is a mixture of experts, some of them with dense layers between."""

WITH_BUFFERS = ("apertus",)
"""Families whose layers store more than parameters; no test cuts them."""

CUT_HYBRIDS = (
    "qwen3_5_text", "lfm2", "bamba", "falcon_h1", "granitemoehybrid dense", "nemotron_h dense",
)  # fmt: skip
"""Hybrids of which a test cuts whatever their declaration does not fix."""

CUT_BY_TOKEN = (
    "gemma4_text", "gemma4_text small", "gemma4_text shared", "gemma3n_text",
    "gemma3n_text shared",
)  # fmt: skip
"""Models with per-layer embeddings, and their relative without: layers and FFN neurons are cut."""

CUT_SEEING = (
    "step3p7 vision",
    "gemma3 vision",
    "llava",
    "mistral3",
    "qwen2_5_vl",
    "qwen3_vl",
    "smolvlm",
)
"""Models that see, of whose decoder a test cuts layers, KV groups and FFN neurons."""

TIED_INSIDE = ("qwen2_5_vl",)
"""Of these not KV groups, because the class ties the number of heads to the hidden size."""

SEEING_MIXTURES = ("step3p7 experts",)
"""Models that see, of whose decoder a test cuts experts."""

WITH_EXPERTS = (*MIXTURES, *SEEING_MIXTURES)
"""Everything that has experts and is run with text alone."""

NOT_RUN = ("llama4 vision",)
"""What is pruned, saved and loaded, but transformers 5.24 cannot run it without a picture."""

NOT_LOADED = dict.fromkeys(
    ("step3p7 vision", "step3p7 experts"), r"does not contain model\.vision_model"
)
"""What `secateur.load` does not load from a compressed folder, and what it says: transformers
stores a part beside the decoder in another form than it computes with."""

FULL = ["full_attention"]
FOR_LLAMA_CPP: dict[str, dict[str, Any]] = {
    "qwen2_moe": {"mlp_only_layers": []}, "qwen3_moe": {"decoder_sparse_step": 1},
    "smollm3": {"num_hidden_layers": 4, "no_rope_layers": [1, 1, 1, 0], "layer_types": FULL * 4},
    **{name: {"head_dim": 32} for name in ("qwen3_5_text", "qwen3_5 vision", "qwen3_5_moe")},
}  # fmt: skip
"""What llama.cpp needs of a type: published models have it, and the tiny ones here do not."""

ZOO = (*CONFIGS, *DENSE, *HYBRIDS, *SEEING, *MIXTURES)
"""Everything that tests/steps/prune/test_zoo.py prunes, saves and loads."""

TIED = "one for embedding and head"
TRIMMED = {
    **dict.fromkeys(("llama", "gpt2", "opt"), TIED), "gemma2": f"{TIED}, capped logits",
    **dict.fromkeys(("qwen2", "mistral3", "llama4"), "embedding and head"),
    "phi": "embedding and head, with a bias", "granite": "embedding and head, scaled logits",
    "deepseek_v4": "embedding, head, and the experts of each token",
    "gemma3 vision": f"{TIED}, ids of pictures",
    **dict.fromkeys(("gemma4_text small", "gemma4 vision small", "gemma3n_text"),
                    f"{TIED}, and embeddings of each layer"),
    "gemma3n vision": "the same, and ranges of ids for pictures and sounds",
}  # fmt: skip
"""Families whose tokens a test removes, and their tables of tokens."""

POOLED, FAST = ("Pooling", "Normalize"), "PreTrainedTokenizerFast"
EMBEDDERS: dict[str, tuple[str, str, dict[str, Any], str, tuple[str, ...]]] = {
    "EmbeddingGemma": (
        "Gemma3TextModel", "characters", {"use_bidirectional_attention": True, "sliding_window": 16,
        "num_key_value_heads": 2, "head_dim": 8}, "GemmaTokenizer",
        ("Pooling", "Dense", "Dense", "Normalize"),
    ),
    "Qwen3-Embedding": ("Qwen3ForCausalLM", "byte-level",
                        {"num_key_value_heads": 2, "head_dim": 8}, "Qwen2Tokenizer", POOLED),
    "XLM-R": ("XLMRobertaModel", "unigram of letters", {}, "XLMRobertaTokenizer", POOLED),
    "mBERT": ("BertModel", "bert", {}, "BertTokenizer", POOLED),
    "ModernBERT": ("ModernBertModel", "byte-level", {}, FAST, POOLED),
    "MPNet": ("MPNetModel", "bert", {}, FAST, POOLED),
    "BERT with a head": ("BertForMaskedLM", "bert", {}, "BertTokenizer", ()),
    "XLM-R with a head": ("XLMRobertaForMaskedLM", "unigram of letters", {}, FAST, ()),
    "DistilBERT with a head": ("DistilBertForMaskedLM", "bert", {}, "BertTokenizer", ()),
    "ModernBERT with a head": ("ModernBertForMaskedLM", "clip", {}, FAST, ()),
    "reranker": ("BertForSequenceClassification", "bert", {}, "BertTokenizer", ()),
}  # fmt: skip
"""Embedding models: class, kind of tokenizer, settings, class of the tokenizer, further modules."""

CUT_MIXTURES: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(
        ("qwen2_moe", "qwen3_moe", "glm4_moe", "glm4_moe_lite", "deepseek_v2", "deepseek_v3",
         "dots1", "ernie4_5_moe", "llama4"),
        ("layers", "groups", "neurons", "hidden"),
    ),
    **dict.fromkeys(
        ("mixtral", "olmoe", "qwen3_next", "qwen3_5_moe", "gpt_oss", "minimax_m2", "phimoe",
         "granitemoe", "hunyuan_v1_moe"),
        ("layers", "groups", "hidden"),
    ),
    "lfm2_moe": ("layers", "groups", "neurons"),
    "gemma4": ("layers", "neurons"),
    "granitemoehybrid": ("layers", "groups", "neurons"),
    **dict.fromkeys(
        ("minimax_m3", "nemotron_h", "glm_moe_dsa", "hy_v3", "deepseek_v4"), ("layers",)
    ),
}  # fmt: skip
"""What a test cuts of mixtures besides experts; neurons are those of layers without experts."""

PLAIN_MIXTURES = ("mixtral", "qwen2_moe", "qwen3_moe")
"""Those with plain attention, `mlp.experts`, SwiGLU and a router by softmax."""


def config_of(family: str) -> Any:
    """The configuration of a tiny model."""
    if family in SEEING:
        return t.AutoConfig.for_model(family.split()[0], **deepcopy(SEEING[family]))
    if family in SETTINGS:
        return t.AutoConfig.for_model(family.split()[0], **deepcopy({**SIZES, **SETTINGS[family]}))
    return (CONFIGS | DENSE | MIXTURES)[family]()


def class_of(config: Any) -> Any:
    """The Auto class that builds all of a model, and not only the decoder of one that sees."""
    sees = hasattr(config, "vision_config")
    return t.AutoModelForImageTextToText if sees else t.AutoModelForCausalLM


def tiny_model(family: str, seed: int = 0, **changes: Any) -> nn.Module:
    """A randomly initialised model; norms and biases are not left at their neutral values.

    Args:
        family: its name here.
        seed: of its weights.
        changes: entries of the configuration that are not the usual ones.
    """
    torch.manual_seed(seed)
    config = config_of(family)
    config.update(changes)
    model = class_of(config).from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
            elif "embed" not in name and "wte" not in name:
                parameter.mul_(4.0)
        for name, buffer in model.named_buffers():
            if "bias" in name:  # of a router, for each expert
                buffer.add_(0.1 * torch.randn_like(buffer))
    return with_routes(model)


def with_routes(model: nn.Module) -> nn.Module:
    """A model in whose tables of experts, if it has any, each token has two different ones."""
    for name, table in model.named_buffers():
        if name.endswith("tid2eid"):
            first = torch.randint(6, table.shape[:1])
            table.copy_(torch.stack([first, (first + torch.randint(1, 6, first.shape)) % 6], 1))
    return model


def tiny_windows(samples: int = 6, length: int = 20, seed: int = 1) -> torch.Tensor:
    """Token windows [samples, length]."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, 96, (samples, length), generator=generator)


def matrices(model: nn.Module) -> dict[str, nn.Module]:
    """All matrices of the decoder layers, found without the library."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, Conv1D))
        and name.split(".")[-1] not in ("lm_head", "embed_out", "project_in", "project_out")
    }


def weight_of(module: nn.Module) -> torch.Tensor:
    """The weight of a matrix as a view [out, in]."""
    return module.weight.data if isinstance(module, nn.Linear) else module.weight.data.t()


def zeros_of(model: nn.Module) -> dict[str, torch.Tensor]:
    """Where the matrices of the decoder layers are zero, by layer and name."""
    layers = describe(model).layers(model)
    return {
        x.name: x.weight == 0
        for i, layer in enumerate(layers)
        for x in linears_of(layer, f"{i}").values()
    }
