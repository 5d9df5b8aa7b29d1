"""Sizes read from a configuration alone, against the modules that transformers builds of it."""

from __future__ import annotations

import json
from typing import Any

import pytest
from transformers import AutoConfig

from secateur.models.counting import counted
from secateur.models.experts import open_experts
from secateur.models.header import GgufHeader, GgufTensor
from secateur.models.plain_decoder import PLAIN, PlainDecoder, gguf_configuration
from secateur.models.skeleton import auto_class, without_weights

SIZES: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
}
WINDOWS = {"sliding_window": 8, "layer_types": 2 * ["sliding_attention", "full_attention"]}
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "free heads": {"head_dim": 12},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "tied": {"tie_word_embeddings": True},
    "one window": {"sliding_window": 8},
    "no window": {"sliding_window": None},
    "windows": WINDOWS,
    "windows used": {**WINDOWS, "use_sliding_window": True},
    "few experts": {"num_experts": 6, "num_local_experts": 6, "num_experts_per_tok": 3,
                    "moe_intermediate_size": 24},
    "some layers mixed": {"decoder_sparse_step": 2},
    "a dense layer": {"mlp_only_layers": [1]},
}  # fmt: skip


@pytest.mark.parametrize("family", PLAIN)
def test_sizes_are_those_of_the_modules(family: str) -> None:
    """Whole and shortened configurations; what is not plain is left to transformers."""
    read = 0
    for change in VARIANTS.values():
        config = AutoConfig.for_model(family, **SIZES | change)
        with without_weights():
            model = auto_class(config).from_config(config)
        open_experts(model)
        for short in (False, True):  # save_pretrained leaves default values out
            written = json.loads(config.to_json_string(use_diff=short)) | {"model_type": family}
            found = PlainDecoder.of(written)
            if found is not None:
                read += 1
                assert found.shape("it") == counted("it", model), written
    assert read >= 14


@pytest.mark.parametrize(
    "change",
    [
        {"model_type": "gpt2"},
        {"model_type": 3},
        {"num_hidden_layers": 10**9},
        {"num_hidden_layers": "4"},
        {"hidden_size": 0},
        {"hidden_size": True},
        {"hidden_size": None},
        {"num_attention_heads": 5},
        {"num_key_value_heads": 4},
        {"head_dim": -8},
        {"layer_types": ["full_attention"]},
        {"layer_types": 4 * ["linear_attention"]},
        {"layer_types": 7},
        {"layer_types": 4 * ["sliding_attention"], "sliding_window": None},
        {"auto_map": {"AutoModelForCausalLM": "modeling.Mine"}},
        {"secateur_cut": {"shapes": {}}},
    ],
)
def test_what_is_not_plain_is_left_to_transformers(change: dict[str, Any]) -> None:
    plain = {"model_type": "llama", **SIZES}
    assert PlainDecoder.of(plain) is not None
    assert PlainDecoder.of(plain | change) is None


def test_a_gguf_header_says_the_same_as_the_configuration() -> None:
    """As `convert_hf_to_gguf.py` writes it: names of ggml, the head left out where it is tied."""
    config = {**SIZES, "model_type": "qwen3", "head_dim": 12, "tie_word_embeddings": True}
    metadata = {
        "general.architecture": "qwen3", "qwen3.block_count": 4, "qwen3.embedding_length": 48,
        "qwen3.feed_forward_length": 80, "qwen3.attention.head_count": 6,
        "qwen3.attention.head_count_kv": 2, "qwen3.attention.key_length": 12,
    }  # fmt: skip
    tensors = [GgufTensor("token_embd.weight", "F16", (96, 48), 0, 0)]
    read = PlainDecoder.of(gguf_configuration(GgufHeader(3, metadata, tuple(tensors), 0)))
    assert read is not None
    assert read == PlainDecoder.of(config)
    tensors.append(GgufTensor("output.weight", "F16", (96, 48), 0, 0))
    apart = PlainDecoder.of(gguf_configuration(GgufHeader(3, metadata, tuple(tensors), 0)))
    assert apart is not None
    assert not apart.tied
    mixed = {**metadata, "general.architecture": "nosuch"}
    assert PlainDecoder.of(gguf_configuration(GgufHeader(3, mixed, tuple(tensors), 0))) is None
