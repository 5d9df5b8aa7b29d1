"""The computed tables are those of the pages, and sizes are those of compressed models."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from tiny import save_tiny
from transformers import AutoConfig

import computed_tables
import part_pages
import secateur
from secateur.advisor.advice import weight_bytes
from secateur.advisor.options import STRUCTURES, VALUES, ZEROS, CompressionWay
from secateur.models.checkpoint import read_headers, shard_files
from secateur.models.shape import PlainDecoder


@pytest.mark.parametrize("script", [computed_tables, part_pages])
def test_the_pages_are_up_to_date(script: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """If not: `python tools/computed_tables.py` or `part_pages.py`."""
    monkeypatch.setattr("sys.argv", [script.__name__, "--check"])
    script.main()


@pytest.mark.parametrize("values", ["bfloat16", "int8", "int4", "int2"])
@pytest.mark.parametrize("zeros", ["none", "50 %", "2:4"])
def test_sizes_are_those_of_a_compressed_model(tmp_path: Path, zeros: str, values: Any) -> None:
    model = save_tiny(tmp_path / "model", "mistral", dtype=torch.bfloat16)
    config = AutoConfig.from_pretrained(model)
    sizes = PlainDecoder(
        layers=config.num_hidden_layers, hidden=config.hidden_size, vocabulary=config.vocab_size,
        ffn=config.intermediate_size, heads=config.num_attention_heads, head=config.head_dim,
        kv_heads=config.num_key_value_heads, tied=config.tie_word_embeddings,
    )  # fmt: skip
    _, sparsity, pattern = computed_tables.ZEROS[zeros]
    pruned = model
    if sparsity:
        pruned = tmp_path / "pruned"
        secateur.prune(
            model, method="magnitude", output=pruned, pattern=pattern or "unstructured",
            sparsity=None if pattern else sparsity,
        )  # fmt: skip
    format = "n-of-m" if pattern else "bitmask" if sparsity else "dense"
    small = tmp_path / "small"
    secateur.compress(pruned, output=small, values=values, format=format)
    headers = read_headers(shard_files(small))
    stored = sum(entry.size_bytes for header in headers for entry in header.values())
    assert stored == computed_tables.stored_bytes(sizes, zeros, values)


def test_two_sizes_by_hand() -> None:
    """Llama-2-7B: 32 layers of 202,375,168 weights, two ends of 32000 · 4096, 65 norms."""
    seven = computed_tables.FACTS.shapes["llama-2-7b"]
    linears, rest = 32 * 202_375_168, 2 * (2 * 32_000 * 4096 + 65 * 4096)
    assert computed_tables.stored_bytes(seven, "none", "bfloat16") == 2 * linears + rest
    assert computed_tables.stored_bytes(seven, "50 %", "bfloat16") == linears * 9 // 8 + rest


@pytest.mark.parametrize("model", computed_tables.MODELS.values())
@pytest.mark.parametrize(
    ("zeros", "values"), [("none", "bfloat16"), ("none", "int8"), ("50 %", "int4")]
)
def test_the_advice_counts_the_bytes_that_are_stored(model: str, zeros: str, values: str) -> None:
    """On 0d9766ca advice gave embedding and head of every model 8 bits beside integers."""
    sizes = computed_tables.FACTS.shapes[model]
    way = CompressionWay(
        STRUCTURES["whole"],
        ZEROS["dense" if zeros == "none" else "50%"],
        VALUES["bf16" if values == "bfloat16" else values],
    )
    stored = computed_tables.stored_bytes(sizes, zeros, values)
    assert weight_bytes(sizes.shape(model), way) == pytest.approx(stored, rel=2e-3)
