"""Random models as folders and as GGUF files, to be timed and for nothing else."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from safetensors.torch import save_file
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from secateur.models.skeleton import quiet_transformers

Q8_0 = gguf.GGMLQuantizationType.Q8_0
ARCHITECTURES = {
    "llama": gguf.MODEL_ARCH.LLAMA,
    "mixtral": gguf.MODEL_ARCH.LLAMA,
    "qwen3_moe": gguf.MODEL_ARCH.QWEN3MOE,
    "gemma3_text": gguf.MODEL_ARCH.GEMMA3,
}
FILE_TYPES = {
    Q8_0: gguf.LlamaFileType.MOSTLY_Q8_0,
    gguf.GGMLQuantizationType.Q4_0: gguf.LlamaFileType.MOSTLY_Q4_0,
}


SHAPE: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 32000,
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 22,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "max_position_embeddings": 32768,  # llama.cpp takes no longer prompts
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "dtype": "bfloat16",
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Of all tensors of a random model, by their names without `.weight`."""
    known = CONFIG_MAPPING[config["model_type"]](**config)
    with torch.device("meta"), quiet_transformers():
        model = AutoModelForCausalLM.from_config(known)
    return {n.removesuffix(".weight"): tuple(p.shape) for n, p in model.named_parameters()}


def random_tensors(config: dict[str, Any], zeros: str = "50 %") -> dict[str, torch.Tensor]:
    """All of them; experts are stored fused.

    Args:
        config: as in `config.json`.
        zeros: of each row of the linears, `50 %`, `70 %` or `2:4`.
    """
    torch.manual_seed(0)
    tensors = {}
    for name, shape in shapes(config).items():
        if len(shape) == 1:
            tensors[name] = torch.ones(shape, dtype=torch.bfloat16)
            continue
        weight = torch.randn(shape) * 0.02
        if ".layers." in name and not name.endswith(".gate"):  # no router
            among = weight.unflatten(-1, (-1, 4)) if zeros == "2:4" else weight
            share = 0.7 if zeros == "70 %" else 0.5
            rank = round(share * among.shape[-1])
            least = among.abs().kthvalue(rank, dim=-1, keepdim=True).values
            among[among.abs() <= least] = 0
        tensors[name] = weight.bfloat16()
    return tensors


def write_checkpoint(
    config: dict[str, Any], tensors: dict[str, torch.Tensor], folder: Path
) -> Path:
    """As transformers would."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    named = {f"{n}.weight" if t.ndim < 3 else n: t for n, t in tensors.items()}
    save_file(named, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def write_gguf(
    config: Mapping[str, Any],
    tensors: Mapping[str, torch.Tensor],
    file: Path,
    kind: gguf.GGMLQuantizationType = Q8_0,
) -> Path:
    """With a vocabulary of placeholders. The order within heads does not matter for speed.

    Args:
        config: as in `config.json`.
        tensors: by their names in transformers, without `.weight`; no `lm_head` where it is tied.
            Rows are of multiples of 32 values, the blocks of Q8_0 and Q4_0. A tensor with several
            names is quantized once.
        file: to be written.
        kind: of all matrices.
    """
    arch = ARCHITECTURES[config["model_type"]]
    writer = gguf.GGUFWriter(file, gguf.MODEL_ARCH_NAMES[arch])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    if arch != gguf.MODEL_ARCH.GEMMA3:  # it rotates all of a head
        writer.add_rope_dimension_count(config["head_dim"])
    if "sliding_window" in config:
        writer.add_sliding_window(config["sliding_window"])
    if "num_experts_per_tok" in config:
        writer.add_expert_count(config.get("num_local_experts") or config["num_experts"])
        writer.add_expert_used_count(config["num_experts_per_tok"])
    if "moe_intermediate_size" in config:
        writer.add_expert_feed_forward_length(config["moe_intermediate_size"])
    writer.add_file_type(FILE_TYPES[kind])
    writer.add_tokenizer_model("llama")
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    words = [*special, *(f"t{i}" for i in range(config["vocab_size"] - len(special)))]
    writer.add_token_list(words)
    writer.add_token_scores([0.0] * len(words))
    writer.add_token_types([2, 3, 3, *[6] * 256, *[1] * (len(words) - len(special))])
    known = gguf.get_tensor_name_map(arch, config["num_hidden_layers"])
    quantized: dict[int, list[np.ndarray]] = {}
    for name, tensor in tensors.items():
        if tensor.ndim == 1 or name.endswith(".gate"):  # norms and routers
            to = known.get_name(name.replace("mlp.gate", "block_sparse_moe.gate"))
            writer.add_tensor(f"{to}.weight", tensor.float().numpy())
            continue
        fused = name.endswith(".gate_up_proj")
        if id(tensor) not in quantized:
            parts = tensor.float().chunk(2, dim=1) if fused else [tensor.float()]
            quantized[id(tensor)] = [gguf.quants.quantize(x.numpy(), kind) for x in parts]
        names = ("gate_proj", "up_proj") if fused else ("gate_up_proj",)
        for part, own in zip(quantized[id(tensor)], names, strict=True):
            to = known.get_name(name.replace("gate_up_proj", own))
            assert to is not None, name
            writer.add_tensor(f"{to}.weight", part, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file
