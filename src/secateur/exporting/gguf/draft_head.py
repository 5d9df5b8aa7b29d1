"""Draft heads in EAGLE-3's form as GGUF files of llama.cpp's architecture `eagle3`.

    llama-server -m PARENT.gguf --model-draft HEAD.gguf --spec-type draft-eagle3

The names are those of a layer of Llama, with `attn_norm_2` for `hidden_norm`, `fc`, and `d2t`: the
token of each row of `output`, int64. Queries and keys are stored as Llama's are: columns that
rotate together stand side by side. Embeddings are the parent's, so the file has none. The tokenizer
is the parent's, which the folder of a head has too.
"""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

import gguf
from torch import Tensor

from secateur.exporting import Exported
from secateur.exporting.gguf.tokenizer import read_vocabulary
from secateur.exporting.gguf.writing import (
    FILE_TYPES,
    Q,
    add_fields,
    dequantized,
    stored_blocks,
    type_of_row,
)
from secateur.models.draft_head import read_head

ARCHITECTURE = "eagle3"

NAMES = {
    "fc": "fc",
    "norm": "output_norm",
    "lm_head": "output",
    "layers.0.input_layernorm": "blk.0.attn_norm",
    "layers.0.hidden_norm": "blk.0.attn_norm_2",
    "layers.0.post_attention_layernorm": "blk.0.ffn_norm",
    **{f"layers.0.self_attn.{x}_proj": f"blk.0.attn_{x}" for x in "qkv"},
    "layers.0.self_attn.o_proj": "blk.0.attn_output",
    **{f"layers.0.mlp.{x}_proj": f"blk.0.ffn_{x}" for x in ("gate", "up", "down")},
}


def write_head_file(folder: Path, kind: Q, file: Path) -> Exported:
    """Write the head of a folder as a GGUF file.

    Args:
        folder: of the head.
        kind: the type of its matrices.
        file: that is written.

    Raises:
        CheckpointError: the folder has no head, or no tokenizer.
        ExportError: llama.cpp would tokenize differently.
    """
    head, made = read_head(folder), Exported()
    config, vocabulary = head.config, read_vocabulary(folder, head.config.vocab_size)
    writer = gguf.GGUFWriter(file, ARCHITECTURE)
    with closing(writer):
        writer.add_name(file.stem)
        writer.add_file_type(FILE_TYPES[kind])
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        own_fields = {
            "vocab_size": config.vocab_size, "context_length": config.max_position_embeddings,
            "embedding_length": config.hidden_size, "block_count": 1,
            "feed_forward_length": config.intermediate_size,
            "head_count": config.num_attention_heads, "head_count_kv": config.num_key_value_heads,
            "key_length": config.head_dim, "value_length": config.head_dim,
            "rope_dimension_count": config.head_dim,
            "rope_freq_base": float(config.rope_parameters["rope_theta"]),
            "layer_norm_rms_eps": config.rms_norm_eps,
        }  # fmt: skip
        add_fields(writer, {**own_fields, **vocabulary.fields})
        writer.add_array(f"{ARCHITECTURE}.target_layers", [*head.taps])
        writer.add_uint32(f"{ARCHITECTURE}.target_hidden_size", config.hidden_size)
        writer.add_bool(f"{ARCHITECTURE}.norm_before_residual", False)
        for name, weight in head.state_dict().items():
            if name.endswith(("q_proj.weight", "k_proj.weight")):
                weight = _in_pairs(weight, config.head_dim)
            own = type_of_row(weight.shape[-1], kind) if weight.ndim == 2 else Q.F32
            stored, named = stored_blocks(weight, own), NAMES[name.removesuffix(".weight")]
            writer.add_tensor(f"{named}.weight", stored, raw_dtype=own)
            made.count_tensor(own.name)
            if weight.ndim == 2:
                made.count_matrix(weight, dequantized(stored, own))
        writer.add_tensor("d2t", head.ids.numpy(), raw_dtype=Q.I64)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    made.file_bytes, made.notes = file.stat().st_size, vocabulary.notes
    return made


def _in_pairs(weight: Tensor, head: int) -> Tensor:
    """Rows i and i + half of every head next to each other."""
    return weight.unflatten(0, (-1, 2, head // 2)).transpose(1, 2).flatten(0, 2)
