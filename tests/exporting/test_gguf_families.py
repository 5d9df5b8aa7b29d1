"""Every family that a GGUF file describes, run by llama.cpp and by transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from gguf_models import PROMPTS, assert_alike, byte_level, fields, save
from zoo import SIZES, config_of

import secateur
from secateur.errors import ExportError

LOCAL = ["sliding_attention", "full_attention", "sliding_attention"]
STRETCHED = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "partial_rotary_factor": 1.0,
    "original_max_position_embeddings": 256,
    "short_factor": [1.0, 1.1, 1.3, 1.5],
    "long_factor": [1.0, 2.0, 3.0, 4.0],
}
LONG = {
    "rope_parameters": STRETCHED,
    "original_max_position_embeddings": 256,
    "max_position_embeddings": 1024,
}


def gemma1() -> Any:
    return transformers.GemmaConfig(**SIZES, head_dim=8)


def granite() -> Any:
    return transformers.GraniteConfig(
        **SIZES,
        attention_multiplier=0.3,
        embedding_multiplier=2.0,
        residual_multiplier=0.7,
        logits_scaling=1.5,
    )


def smollm3() -> Any:
    return transformers.SmolLM3Config(**{**SIZES, "num_hidden_layers": 5})


FAMILIES: dict[str, Any] = {
    "gemma": (gemma1, {}),
    "gemma2": (lambda: config_of("gemma2"), {}),
    "gemma2, cut by one layer": (
        lambda: config_of("gemma2"),
        {"num_hidden_layers": 2, "layer_types": LOCAL[:2]},
    ),
    "gemma3": (lambda: config_of("gemma3"), {}),
    "gemma3 with a soft cap": (lambda: config_of("gemma3"), {"final_logit_softcapping": 5.0}),
    "phi3": (lambda: config_of("phi3"), {}),
    "phi3 with LongRoPE": (lambda: config_of("phi3"), LONG),
    "phi3, half rotated": (
        lambda: config_of("phi3"),
        {
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 10000.0,
                "partial_rotary_factor": 0.5,
            }
        },
    ),
    "granite": (granite, {}),
    "smollm3": (smollm3, {}),
    "mixtral": (lambda: config_of("mixtral"), {}),
    "qwen2_moe": (lambda: config_of("qwen2_moe"), {"mlp_only_layers": []}),
    "qwen2_moe, tied": (
        lambda: config_of("qwen2_moe"),
        {"mlp_only_layers": [], "tie_word_embeddings": True},
    ),
    "qwen3_moe": (lambda: config_of("qwen3_moe"), {"decoder_sparse_step": 1}),
}


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return byte_level()


@pytest.mark.parametrize("name", FAMILIES)
def test_llama_cpp_continues_like_transformers(name, tokenizer, tmp_path: Path) -> None:
    config, changes = FAMILIES[name]
    source = save(tmp_path / "model", tokenizer, config(), **changes)
    found = secateur.export(source, output=tmp_path / "out", type="f32")
    (file,) = found.files
    model = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    assert_alike(tmp_path / "out" / file, model, tokenizer, PROMPTS[:2])


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_compressed_mixtures_too(family, tokenizer, tmp_path: Path) -> None:
    changes = {"decoder_sparse_step": 1} if family == "qwen3_moe" else {}
    source = save(tmp_path / "model", tokenizer, family, **changes)
    secateur.prune(source, output=tmp_path / "pruned", method="magnitude", sparsity=0.5)
    secateur.compress(tmp_path / "pruned", output=tmp_path / "packed", values="keep")
    made = secateur.export(tmp_path / "packed", output=tmp_path / "out", type="f32").exported
    assert made.zeros_kept == made.zeros > 0.45 * made.weights
    (file,) = (tmp_path / "out").iterdir()
    assert_alike(file, secateur.load(tmp_path / "packed", expand=True), tokenizer, PROMPTS[:2])


def test_the_context_ends_where_the_factors_change(tokenizer, tmp_path: Path) -> None:
    source = save(tmp_path / "model", tokenizer, "phi3", **LONG)
    found = secateur.export(source, output=tmp_path / "out", type="f32")
    stored = fields(tmp_path / "out" / found.files[0])
    assert stored["phi3.context_length"] == 256
    assert "limited to 256 tokens" in found.exported.notes[0]


def test_the_window_of_gemma_limits_nothing(tokenizer, tmp_path: Path) -> None:
    source = save(tmp_path / "model", tokenizer, "gemma3")
    found = secateur.export(source, output=tmp_path / "out", type="f32")
    stored = fields(tmp_path / "out" / found.files[0])
    assert stored["gemma3.context_length"] == SIZES["max_position_embeddings"]
    assert stored["gemma3.attention.sliding_window"] == 8
    assert stored["gemma3.attention.sliding_window_pattern"] == 2
    assert not found.exported.notes


@pytest.mark.parametrize(
    ("family", "changes", "said"),
    [
        ("gemma2", {"query_pre_attn_scalar": 9}, "by the root of 9, llama.cpp by that of 8"),
        ("gemma3", {"query_pre_attn_scalar": 9}, "by the root of 9, llama.cpp by that of 8"),
        ("gemma2", {"attn_logit_softcapping": None}, "has no soft caps"),
        ("gemma2", {"hidden_activation": "silu"}, "the activation is silu"),
        ("gemma3", {"layer_types": [LOCAL[1], LOCAL[0], LOCAL[1]]}, "follow no period"),
        ("gemma3", {"use_bidirectional_attention": True}, "see those behind them"),
        ("gemma2", {"tie_word_embeddings": False}, "its head is not its embedding"),
        ("qwen2_moe", {}, r"its layers have \[0, 5\] experts"),
        ("qwen2_moe", {"mlp_only_layers": [], "norm_topk_prob": True}, "by their sum"),
        ("qwen3_moe", {"decoder_sparse_step": 1, "norm_topk_prob": False}, "does not divide"),
        ("llama", {"rope_parameters": {**STRETCHED, "factor": 2.0}}, "of the kind 'longrope'"),
    ],
)
def test_what_llama_cpp_computes_differently_is_refused(
    family, changes, said, tokenizer, tmp_path: Path
) -> None:
    source = save(tmp_path / "model", tokenizer, family, **changes)
    with pytest.raises(ExportError, match=said):
        secateur.export(source, output=tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("qwen3_moe", {"decoder_sparse_step": 1, "norm_topk_prob": False}),
        ("deepseek_v2", {}),
        ("deepseek_v3", {}),
    ],
)
def test_the_refusal_names_a_target_that_takes_the_model(
    family, changes, tokenizer, tmp_path: Path
) -> None:
    source = save(tmp_path / "model", tokenizer, family, **changes)
    with pytest.raises(ExportError, match=r"to='compressed-tensors'") as refusal:
        secateur.export(source, output=tmp_path / "out")
    assert "serve" in str(refusal.value)
    secateur.export(source, output=tmp_path / "out", to="compressed-tensors", type="w8a8")
    assert (tmp_path / "out" / "model.safetensors").is_file()
