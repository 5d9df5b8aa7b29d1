"""Models of Llama's shape as GGUF files, to be timed in llama.cpp and for nothing else."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch

GGUF_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


Q8_0 = gguf.GGMLQuantizationType.Q8_0
FILE_TYPES = {
    Q8_0: gguf.LlamaFileType.MOSTLY_Q8_0,
    gguf.GGMLQuantizationType.Q4_0: gguf.LlamaFileType.MOSTLY_Q4_0,
}


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
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_rope_dimension_count(config["head_dim"])
    writer.add_file_type(FILE_TYPES[kind])
    writer.add_tokenizer_model("llama")
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    words = [*special, *(f"t{i}" for i in range(config["vocab_size"] - len(special)))]
    writer.add_token_list(words)
    writer.add_token_scores([0.0] * len(words))
    writer.add_token_types([2, 3, 3, *[6] * 256, *[1] * (len(words) - len(special))])
    quantized: dict[int, np.ndarray] = {}
    for name, tensor in tensors.items():
        parts = name.split(".", 3)
        known = GGUF_NAMES[parts[3] if name.startswith("model.layers.") else name]
        to = f"blk.{parts[2]}.{known}" if name.startswith("model.layers.") else known
        if tensor.ndim == 1:
            writer.add_tensor(f"{to}.weight", tensor.float().numpy())
            continue
        if id(tensor) not in quantized:
            quantized[id(tensor)] = gguf.quants.quantize(tensor.float().numpy(), kind)
        writer.add_tensor(f"{to}.weight", quantized[id(tensor)], raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file
