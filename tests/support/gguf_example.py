"""A small GGUF file, written by the gguf package."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np


def write_gguf(file: Path) -> Path:
    """Two layers, an embedding and some metadata."""
    writer = gguf.GGUFWriter(str(file), "llama")
    writer.add_name("a small one")
    writer.add_block_count(2)
    writer.add_float32("llama.rope.freq_base", 10000.0)
    writer.add_array("tokenizer.ggml.tokens", [f"token {i}" for i in range(40)])
    writer.add_array("general.languages", ["en", "de"])
    writer.add_tensor("token_embd.weight", np.ones((40, 64), np.float16))
    for layer in range(2):
        q = gguf.quants.quantize(np.ones((32, 64), np.float32), gguf.GGMLQuantizationType.Q8_0)
        writer.add_tensor(f"blk.{layer}.attn_q.weight", q, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
        writer.add_tensor(f"blk.{layer}.attn_norm.weight", np.ones(64, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file
