"""A tiny random model of each architecture, as the folder that llama.cpp's converter reads.

Widths are multiples of 256, so that all types of ggml apply. Names are those of llama.cpp's
architectures; a word after the name tells variants apart.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers as t
from benchmarks.gguf_files import rewritten
from safetensors.torch import load_file, save_file
from tokenizers import (
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
)
from torch import nn

from secateur.exporting.gguf.tokenizer import SPACE
from secateur.models.skeleton import quiet_transformers

sys.path.append(str(Path(__file__).parents[2] / "tests/support"))
from gguf_models import byte_level, predicted, sentencepiece_model

__all__ = ["predicted"]

SPECIAL = (
    "<|endoftext|>", "<pad>", "<unk>", "<bos>", "<eos>", "[gMASK]", "<|user|>", "<|observation|>",
    "<|startoftext|>",
)  # fmt: skip

SIZES: dict[str, Any] = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 128,
}
ALTERNATE = ["sliding_attention", "full_attention"]
WINDOW = {"sliding_window": 8, "layer_types": ALTERNATE * 2}
SHARED = {"shared_expert_intermediate_size": 256}
USED = {"num_experts_per_tok": 2, "moe_intermediate_size": 256}
EXPERTS = {**USED, "num_experts": 8}
LOCAL = {"num_experts_per_tok": 2, "num_local_experts": 8}
ROUTED = {**USED, "n_routed_experts": 8, "n_shared_experts": 1, "first_k_dense_replace": 1}
GROUPS = {"n_group": 4, "topk_group": 2}
ONE_GROUP = {"n_group": 1, "topk_group": 1}
LATENT = {
    "q_lora_rank": 64, "kv_lora_rank": 64, "qk_rope_head_dim": 16, "qk_nope_head_dim": 32,
    "v_head_dim": 64, "num_key_value_heads": 4, "head_dim": 16,
}  # fmt: skip
LINEAR = {
    "linear_key_head_dim": 64, "linear_value_head_dim": 64, "linear_num_key_heads": 2,
    "linear_num_value_heads": 4, "linear_conv_kernel_dim": 4, "full_attention_interval": 2,
    "layer_types": ["linear_attention", "full_attention"] * 2,
}  # fmt: skip
MAMBA = {
    "mamba_n_heads": 8, "mamba_d_head": 64, "mamba_d_state": 16, "mamba_n_groups": 1,
    "mamba_d_conv": 4, "mamba_expand": 2, "mamba_chunk_size": 8,
}  # fmt: skip
GPT_OSS = {
    **LOCAL,
    **WINDOW,
    "intermediate_size": 256,
    "rope_parameters": {"rope_type": "default", "rope_theta": 150000.0},
}
GEMMA = {"query_pre_attn_scalar": 64, "sliding_window": 8}
GEMMA4 = {**GEMMA, "global_head_dim": 64, "tie_word_embeddings": True}


Rewrite = Callable[
    [dict[str, torch.Tensor], dict[str, Any]], tuple[dict[str, torch.Tensor], dict[str, Any]]
]


@dataclass(frozen=True)
class Tiny:
    """One tiny model.

    Attributes:
        kind: the `model_type` of transformers.
        settings: what its configuration needs besides `SIZES`.
        released: what the released `config.json` has and transformers' class does not keep.
        words: its tokenizer: byte-level, or pieces as Llama 2 or as Gemma has them.
        mtp: how it names a layer that predicts one token more; "" without one.
        options: of the converter.
        rewrite: makes the weights and the configuration of an architecture without a class from it.
        blocks: how the experts are stored: "mxfp4" as OpenAI does, "nvfp4" as NVIDIA does.
    """

    kind: str
    settings: dict[str, Any] = field(default_factory=dict)
    released: dict[str, Any] = field(default_factory=dict)
    words: str = "bytes"
    mtp: str = ""
    options: tuple[str, ...] = ()
    blocks: str = ""
    rewrite: Rewrite | None = None


SIGMOID = {"scoring_func": "sigmoid"}
PERIOD_4 = ["sliding_attention"] * 3 + ["full_attention"]
PERIOD_5 = ["sliding_attention"] * 4 + ["full_attention"]
PERIOD_6 = ["sliding_attention"] * 5 + ["full_attention"]

MODELS: dict[str, Tiny] = {
    "llama": Tiny("llama"),
    "llama pieces": Tiny("llama", {"tie_word_embeddings": True}, words="llama"),
    "qwen3": Tiny("qwen3", {"tie_word_embeddings": True}),
    "gemma3": Tiny(
        "gemma3_text", {**GEMMA, "layer_types": PERIOD_6 * 2, "num_hidden_layers": 12},
        words="gemma",
    ),
    "gemma3n": Tiny("gemma3n_text", {
        **GEMMA, "hidden_size_per_layer_input": 256, "num_hidden_layers": 10,
        "layer_types": PERIOD_5 * 2, "num_kv_shared_layers": 0, "laurel_rank": 64,
        "activation_sparsity_pattern": [0.95] * 10, "intermediate_size": [512] * 10,
    }, words="gemma"),
    "gemma4": Tiny("gemma4_text", {
        **GEMMA4, "hidden_size_per_layer_input": 64, "num_hidden_layers": 6,
        "layer_types": ALTERNATE * 3, "num_kv_shared_layers": 2,
    }, {"global_head_dim": 64}, words="gemma"),
    "gemma4 moe": Tiny("gemma4_text", {
        **GEMMA4, "layer_types": ALTERNATE * 2, "num_kv_shared_layers": 0,
        "hidden_size_per_layer_input": 0, "enable_moe_block": True, "num_experts": 8,
        "top_k_experts": 2, "moe_intermediate_size": 256,
    }, {"global_head_dim": 64}, words="gemma"),
    "mixtral": Tiny("mixtral", LOCAL),
    "qwen2moe": Tiny("qwen2_moe", {**EXPERTS, **SHARED}),
    "qwen3moe": Tiny("qwen3_moe", {**EXPERTS, "norm_topk_prob": True}),
    "qwen3moe nvfp4": Tiny(
        "qwen3_moe", {**EXPERTS, "norm_topk_prob": True}, blocks="nvfp4"
    ),
    "qwen3next": Tiny("qwen3_next", {**EXPERTS, **SHARED, **LINEAR}, mtp="mtp"),
    "qwen35moe": Tiny(
        "qwen3_5_moe_text", {**EXPERTS, **SHARED, **LINEAR}, options=("--no-mtp",)
    ),
    "qwen35moe fused": Tiny(
        "qwen3_5_moe_text", {**EXPERTS, **SHARED, **LINEAR},
        options=("--no-mtp", "--fuse-gate-up-exps"),
    ),
    "deepseek2": Tiny("deepseek_v2", {
        **LATENT, **ROUTED, **ONE_GROUP, "topk_method": "greedy", "norm_topk_prob": False,
    }),
    "deepseek2 groups": Tiny("deepseek_v3", {**LATENT, **ROUTED, **GROUPS, "n_routed_experts": 16}, SIGMOID),
    "glm4moe": Tiny("glm4_moe", {
        **ROUTED, **ONE_GROUP, "use_qk_norm": True, "num_nextn_predict_layers": 1,
    }, mtp="layer"),
    "glm4moe lite": Tiny("glm4_moe_lite", {**LATENT, **ROUTED, **ONE_GROUP}, SIGMOID),
    "gpt-oss": Tiny("gpt_oss", GPT_OSS),
    "gpt-oss mxfp4": Tiny("gpt_oss", GPT_OSS, blocks="mxfp4"),
    "granitemoe": Tiny("granitemoe", LOCAL),
    "granitehybrid": Tiny("granitemoehybrid", {
        **LOCAL, **MAMBA, "shared_intermediate_size": 256,
        "layer_types": ["mamba", "attention"] * 2,
    }),
    "minimax-m2": Tiny(
        "minimax_m2", {**LOCAL, "intermediate_size": 256, "rotary_dim": 32}, SIGMOID
    ),
    "olmoe": Tiny("olmoe", {
        "num_experts": 8, "num_experts_per_tok": 2, "num_key_value_heads": 4,
    }),
    "llama4": Tiny("llama4_text", {
        "num_experts_per_tok": 1, "num_local_experts": 8, "intermediate_size_mlp": 512,
        "interleave_moe_layer_step": 2, "num_hidden_layers": 8,
    }),
    "nemotron_h_moe": Tiny("nemotron_h", {
        "layers_block_type": ["mamba", "moe", "attention", "moe"], "ssm_state_size": 16,
        "mamba_num_heads": 8, "mamba_head_dim": 64, "n_groups": 1, "chunk_size": 8, "expand": 2,
        **USED, "n_routed_experts": 8, "n_shared_experts": 1, **ONE_GROUP,
        "moe_shared_expert_intermediate_size": 256, "norm_topk_prob": True,
    }),
    "ernie4_5-moe": Tiny("ernie4_5_moe", {
        "moe_num_experts": 8, "moe_k": 2, "moe_intermediate_size": 256, "moe_layer_start_index": 1,
        "moe_num_shared_experts": 1, "moe_layer_interval": 1,
    }),
    "lfm2moe": Tiny("lfm2_moe", {
        **EXPERTS, "num_dense_layers": 1, "layer_types": ["conv", "full_attention"] * 2,
    }),
    "phimoe": Tiny(
        "phimoe", {**LOCAL, "intermediate_size": 256},
        {"original_max_position_embeddings": 128}, words="llama",
    ),
    "dots1": Tiny("dots1", {
        **ROUTED, **ONE_GROUP, "layer_types": ["full_attention"] * 4, "num_key_value_heads": 4,
    }, SIGMOID),
    "hunyuan-moe": Tiny(
        "hunyuan_v1_moe", {"num_experts": 8, "moe_topk": 2, "intermediate_size": 256},
        {"moe_intermediate_size": [256] * 4, "moe_topk": [2] * 4, "num_shared_expert": [1] * 4},
    ),
    "jamba": Tiny("jamba", {
        "attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2,
        "expert_layer_offset": 1, "num_experts": 8, "num_experts_per_tok": 2, "mamba_d_state": 16,
        "mamba_dt_rank": 16, "use_mamba_kernels": False,
    }, words="llama"),
    "exaone-moe": Tiny("exaone_moe", {
        **USED, "num_experts": 8, "num_shared_experts": 1, **ONE_GROUP,
        "first_k_dense_replace": 1, "sliding_window": 8, "layer_types": PERIOD_4 * 2,
        "mlp_layer_types": ["dense"] + ["sparse"] * 7, "num_hidden_layers": 8,
    }, SIGMOID),
    "afmoe": Tiny("afmoe", {
        **EXPERTS, "sliding_window": 8, "layer_types": PERIOD_4 * 2, "num_shared_experts": 1,
        "num_dense_layers": 1, "num_hidden_layers": 8, "mup_enabled": True,
    }, {"route_norm": True}),
    "cohere2moe": Tiny("cohere2_moe", {**EXPERTS, **WINDOW}),
    "hunyuan-v3": Tiny("hy_v3", {**EXPERTS}),
    "glm-dsa": Tiny("glm_moe_dsa", {**LATENT, **ROUTED, **ONE_GROUP}),
    "granitemoe windows": Tiny("granitemoe_swa", {**LOCAL, **WINDOW}),
    "solar-open": Tiny("solar_open", {
        **ROUTED, **ONE_GROUP, "first_k_dense_replace": 0,
        "rope_parameters": {
            "rope_type": "default", "rope_theta": 1e6, "partial_rotary_factor": 1.0,
        },
    }),
    "mellum": Tiny("mellum", {**EXPERTS, **WINDOW}),
    "grovemoe": Tiny(
        "qwen3_moe", {**EXPERTS, "norm_topk_prob": True}, rewrite=rewritten.grovemoe
    ),
    "smallthinker": Tiny(
        "qwen3_moe", {**EXPERTS, "norm_topk_prob": True}, rewrite=rewritten.smallthinker
    ),
    "bailingmoe2": Tiny("glm4_moe", {
        **ROUTED, **GROUPS, "n_routed_experts": 16, "use_qk_norm": True,
        "num_nextn_predict_layers": 1,
    }, mtp="layer", rewrite=rewritten.bailingmoe2),
    "gemma2": Tiny("gemma2", {**GEMMA, "layer_types": ALTERNATE * 2}, words="gemma"),
    "qwen2": Tiny("qwen2"),
    "phi3": Tiny("phi3", words="llama"),
    "falcon-h1": Tiny("falcon_h1", {**MAMBA, "mamba_d_ssm": 512}),
    "mamba2": Tiny("mamba2", {
        "state_size": 16, "expand": 2, "num_heads": 8, "head_dim": 64, "n_groups": 1,
        "chunk_size": 8,
    }),
    "qwen35": Tiny("qwen3_5_text", LINEAR, options=("--no-mtp",)),
    "qwen35 mtp": Tiny("qwen3_5_text", LINEAR, {"mtp_num_hidden_layers": 1}, mtp="mtp"),
    "qwen35moe mtp": Tiny(
        "qwen3_5_moe_text", {**EXPERTS, **SHARED, **LINEAR}, {"mtp_num_hidden_layers": 1},
        mtp="mtp",
    ),
    "smollm3": Tiny("smollm3", {"no_rope_layers": [1, 1, 1, 0]}),
}  # fmt: skip
"""By llama.cpp's architecture; a word after it tells variants apart."""


def tokenizer() -> t.PreTrainedTokenizerFast:
    """Byte-level BPE with the rules of SmolLM2 and the special tokens that converters look for."""
    return byte_level(
        SPECIAL, pad_token="<pad>", unk_token="<unk>", bos_token="<bos>", eos_token="<eos>"
    )


def pieces(folder: Path, gemma: bool) -> t.PreTrainedTokenizerFast:
    """Pieces and bytes as Llama 2 or Gemma has them; writes `tokenizer.model` into the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.model").write_bytes(sentencepiece_model())
    config = {"tokenizer_class": "LlamaTokenizer", "legacy": False, "add_bos_token": True}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    with quiet_transformers():
        llama = t.AutoTokenizer.from_pretrained(folder)
    if not gemma:
        return llama
    model = json.loads(llama.backend_tokenizer.to_str())["model"]
    merges = [tuple(m) for m in model["merges"]]
    inner = Tokenizer(
        models.BPE(model["vocab"], merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    inner.normalizer = normalizers.Replace(" ", SPACE)
    inner.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    inner.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    return t.PreTrainedTokenizerFast(
        tokenizer_object=inner, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )


def config_of(name: str, words: Any) -> Any:
    """The configuration of a model with a tokenizer."""
    tiny, size = MODELS[name], len(words)
    ids = {"bos_token_id": words.bos_token_id, "eos_token_id": words.eos_token_id,
           "pad_token_id": words.pad_token_id, "vocab_size": size}  # fmt: skip
    if tiny.kind.startswith(("gemma3n", "gemma4")):
        ids["vocab_size_per_layer_input"] = size
    return t.AutoConfig.for_model(tiny.kind, **deepcopy({**SIZES, **ids, **tiny.settings}))


@torch.no_grad()
def random_model(config: Any, seed: int = 0) -> nn.Module:
    """A random model whose logits and scores of experts lie far apart, in float32."""
    torch.manual_seed(seed)
    model = t.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    for key, parameter in model.named_parameters():
        if parameter.ndim == 1:
            parameter.add_(0.1 * torch.randn_like(parameter))
        elif "embed" not in key:
            parameter.mul_(2.0)
        if "router" in key or key.endswith((".gate.weight", ".gate.wg.weight")):
            parameter.copy_(0.5 * torch.randn_like(parameter))
    for key, buffer in model.named_buffers():
        if "bias" in key:  # of a router, for each expert
            buffer.add_(0.1 * torch.randn_like(buffer))
    return model


def add_mtp(folder: Path, style: str) -> None:
    """Add a layer that predicts one token more, as released files have it: a changed last layer."""
    file = folder / "model.safetensors"
    state = load_file(file)
    numbers = {int(name.split(".")[2]) for name in state if name.startswith("model.layers.")}
    last = f"model.layers.{max(numbers)}."
    more = {name: state[name] for name in state if name.startswith(last)}
    hidden = state["model.norm.weight"].numel()
    new, norms = f"model.layers.{max(numbers) + 1}.", ("enorm", "hnorm", "shared_head.norm")
    joined = new + "eh_proj"
    if style == "mtp":
        new, joined = "mtp.layers.0.", "mtp.fc"
        norms = ("mtp.pre_fc_norm_embedding", "mtp.pre_fc_norm_hidden", "mtp.norm")
    else:
        norms = tuple(new + name for name in norms)
    generator = torch.Generator().manual_seed(1)
    for name, tensor in more.items():
        noise = torch.randn(tensor.shape, generator=generator)
        state[name.replace(last, new)] = tensor + 0.01 * noise
    for name in norms:
        state[f"{name}.weight"] = 1 + 0.1 * torch.randn(hidden, generator=generator)
    state[f"{joined}.weight"] = 0.05 * torch.randn(hidden, 2 * hidden, generator=generator)
    save_file(state, file, {"format": "pt"})


FP4 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
"""The magnitudes of four bits; the fifth value of a code's eight is the sign."""


def as_mxfp4(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Codes [..., out, blocks, 16], scales [..., out, blocks] and values of a weight [..., in, out]."""
    blocks = weight.transpose(-1, -2).unflatten(-1, (-1, 32))
    exponent = (blocks.abs().amax(-1, keepdim=True) / 6).log2().ceil()
    scaled = blocks / exponent.exp2()
    code = (scaled.abs()[..., None] - FP4).abs().argmin(-1)
    values = (FP4[code] * scaled.sign() * exponent.exp2()).flatten(-2).transpose(-1, -2)
    code = (code + 8 * (scaled < 0)).to(torch.uint8)
    scales = (exponent[..., 0] + 127).to(torch.uint8)
    return code[..., ::2] | code[..., 1::2] << 4, scales, values


def store_mxfp4(folder: Path, model: nn.Module) -> None:
    """Store the experts of GPT-OSS in MXFP4, and round the model."""
    file, config = folder / "model.safetensors", folder / "config.json"
    state = load_file(file)
    for name, parameter in model.named_parameters():
        if name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            codes, scales, values = as_mxfp4(state.pop(name))
            state |= {f"{name}_blocks": codes.contiguous(), f"{name}_scales": scales}
            parameter.data.copy_(values)
    save_file(state, file, {"format": "pt"})
    own = {"quantization_config": {"quant_method": "mxfp4"}}
    config.write_text(json.dumps(json.loads(config.read_text()) | own))


def as_nvfp4(weight: torch.Tensor, scale: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Codes [out, in / 2], scales [out, in / 16] and values of a weight [out, in]."""
    blocks = weight.unflatten(-1, (-1, 16))
    scales = (blocks.abs().amax(-1) / 6 / scale).to(torch.float8_e4m3fn)
    unit = scales.float()[..., None] * scale
    scaled = blocks / unit
    code = (scaled.abs()[..., None] - FP4).abs().argmin(-1)
    values = (FP4[code] * scaled.sign() * unit).flatten(-2)
    code = (code + 8 * (scaled < 0)).to(torch.uint8).flatten(-2)
    return code[..., ::2] | code[..., 1::2] << 4, scales, values


def store_nvfp4(folder: Path) -> nn.Module:
    """Store experts in NVFP4, each with a scale of its own; returns the rounded model."""
    file, config = folder / "model.safetensors", folder / "config.json"
    exact, stored = load_file(file), {}
    for name, weight in exact.items():
        stored[name] = weight
        if match := re.search(r"\.experts\.(\d+)\..*_proj\.weight$", name):
            scale, owner = 0.5 + 0.1 * int(match[1]), name.removesuffix(".weight")
            codes, scales, exact[name] = as_nvfp4(weight, scale)
            stored |= {name: codes, f"{owner}.weight_scale": scales}
            stored[f"{owner}.weight_scale_2"] = torch.tensor(scale)
    save_file(exact, file, {"format": "pt"})
    with quiet_transformers():
        model = t.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    save_file({name: one.contiguous() for name, one in stored.items()}, file, {"format": "pt"})
    own = {"quantization_config": {"quant_method": "modelopt", "quant_algo": "NVFP4"}}
    config.write_text(json.dumps(json.loads(config.read_text()) | own))
    return model


def saved(name: str, folder: Path) -> nn.Module:
    """Write a model with its tokenizer; returns the model."""
    tiny = MODELS[name]
    words = tokenizer() if tiny.words == "bytes" else pieces(folder, tiny.words == "gemma")
    model = random_model(config_of(name, words))
    with quiet_transformers():
        model.save_pretrained(folder)
    words.save_pretrained(folder)
    if tiny.mtp:
        add_mtp(folder, tiny.mtp)
    if tiny.rewrite:
        file, described = folder / "model.safetensors", folder / "config.json"
        state, config = tiny.rewrite(load_file(file), json.loads(described.read_text()))
        save_file(state, file, {"format": "pt"})
        described.write_text(json.dumps(config))
    if tiny.blocks == "mxfp4":
        store_mxfp4(folder, model)
    return store_nvfp4(folder) if tiny.blocks == "nvfp4" else model
