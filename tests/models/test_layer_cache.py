"""What layers keep and decoders hold, against published sizes and the modules of transformers."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import pytest
import torch
import transformers as t
from zoo import CONFIGS, DENSE, HYBRIDS, MIXTURES, SEEING, tiny_model, tiny_windows

from secateur.models.counting import counted, layer_caches
from secateur.models.experts import open_experts
from secateur.models.shape import LayerCache, ModelShape, PlainDecoder
from secateur.models.skeleton import auto_class, without_weights

LONG = 32768


class Published(NamedTuple):
    """A model by its published configuration.

    Attributes:
        config: of transformers.
        token: bytes that the first token adds, all layers.
        beyond: bytes that a token adds when all windows are full.
        long: bytes for 32768 tokens without states.
        state: bytes of all states.
        attention: operations of attention for one more token after 32768, without states.
    """

    config: Any
    token: int
    beyond: int
    long: int
    state: int
    attention: int


MIXED = {"num_key_value_heads": 2, "head_dim": 256}

PUBLISHED = {
    # arXiv:2407.21783: 32 layers, 8 KV heads of 128
    "Llama-3-8B": Published(
        lambda: t.LlamaConfig(
            vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32,
            num_attention_heads=32, num_key_value_heads=8,
        ),
        32 * 4096, 32 * 4096, 32 * 4096 * LONG, 0, 32 * 4 * LONG * 32 * 128,
    ),
    # arXiv:2412.19437, section 4.2: 61 layers, 128 heads, a latent of 512 and a rotary key of 64
    "DeepSeek-V3": Published(
        lambda: t.DeepseekV3Config(
            vocab_size=129280, hidden_size=7168, intermediate_size=18432,
            moe_intermediate_size=2048, num_hidden_layers=61, num_attention_heads=128,
            num_key_value_heads=128, n_routed_experts=256, n_shared_experts=1,
            num_experts_per_tok=8, first_k_dense_replace=3, n_group=8, topk_group=4,
            q_lora_rank=1536, kv_lora_rank=512, qk_rope_head_dim=64, qk_nope_head_dim=128,
            v_head_dim=128,
        ),
        61 * 1152, 61 * 1152, 61 * 1152 * LONG, 0, 61 * 2 * LONG * 128 * (2 * 512 + 64),
    ),
    # arXiv:2405.04434, appendix B: 27 layers, 16 heads
    "DeepSeek-V2-Lite": Published(
        lambda: t.DeepseekV2Config(
            vocab_size=102400, hidden_size=2048, intermediate_size=10944,
            moe_intermediate_size=1408, num_hidden_layers=27, num_attention_heads=16,
            num_key_value_heads=16, n_routed_experts=64, n_shared_experts=2,
            num_experts_per_tok=6, first_k_dense_replace=1, n_group=1, topk_group=1,
            topk_method="greedy", q_lora_rank=None, kv_lora_rank=512, qk_rope_head_dim=64,
            qk_nope_head_dim=128, v_head_dim=128,
        ),
        27 * 1152, 27 * 1152, 27 * 1152 * LONG, 0, 27 * 2 * LONG * 16 * (2 * 512 + 64),
    ),
    # arXiv:2503.19786: five layers with a window of 1024 to each full one; 4 KV heads of 256
    "Gemma 3 4B": Published(
        lambda: t.Gemma3TextConfig(
            vocab_size=262208, hidden_size=2560, intermediate_size=10240, num_hidden_layers=34,
            num_attention_heads=8, num_key_value_heads=4, head_dim=256, sliding_window=1024,
        ),
        34 * 4096, 5 * 4096, 4096 * (5 * LONG + 29 * 1024), 0,
        4 * 8 * 256 * (5 * LONG + 29 * 1024),
    ),
    # config.json of gemma-3n-E4B: every fifth layer is full, the others see 512 tokens; the last
    # 15 of 35 layers read the keys and values of earlier ones
    "Gemma 3n E4B": Published(
        lambda: t.Gemma3nTextConfig(
            vocab_size=262400, hidden_size=2048, intermediate_size=[16384] * 35,
            num_hidden_layers=35, num_attention_heads=8, **MIXED, sliding_window=512,
            num_kv_shared_layers=15,
        ),
        20 * 2048, 4 * 2048, 2048 * (4 * LONG + 16 * 512), 0,
        4 * 8 * 256 * (7 * LONG + 28 * 512),
    ),
    # config.json of Qwen3-Next-80B-A3B: 12 of 48 layers have attention; the others a state of 32
    # heads · 128 · 128 in float32 and 4 inputs of a convolution over 8192 channels
    "Qwen3-Next": Published(
        lambda: t.Qwen3NextConfig(
            vocab_size=151936, hidden_size=2048, intermediate_size=5120, num_hidden_layers=48,
            num_attention_heads=16, **MIXED, linear_num_key_heads=16, linear_num_value_heads=32,
            linear_key_head_dim=128, linear_value_head_dim=128, linear_conv_kernel_dim=4,
            num_experts=512, num_experts_per_tok=10, moe_intermediate_size=512,
            shared_expert_intermediate_size=512,
        ),
        12 * 2048, 12 * 2048, 12 * 2048 * LONG, 36 * (4 * 32 * 128 * 128 + 2 * 4 * 8192),
        12 * 4 * LONG * 16 * 256,
    ),
    # arXiv:2508.10925: every other layer sees 128 tokens; 8 KV heads of 64
    "gpt-oss-20b": Published(
        lambda: t.GptOssConfig(
            vocab_size=201088, hidden_size=2880, intermediate_size=2880, num_hidden_layers=24,
            num_attention_heads=64, num_key_value_heads=8, head_dim=64, sliding_window=128,
            num_local_experts=32, num_experts_per_tok=4,
        ),
        24 * 2048, 12 * 2048, 2048 * (12 * LONG + 12 * 128), 0,
        4 * 64 * 64 * (12 * LONG + 12 * 128),
    ),
    # arXiv:2312.00752: 64 layers, 5120 channels, 16 states of each, a convolution over 4 tokens
    "Mamba-2.8B": Published(
        lambda: t.MambaConfig(
            vocab_size=50280, hidden_size=2560, num_hidden_layers=64, state_size=16, expand=2,
            conv_kernel=4,
        ),
        0, 0, 0, 64 * 5120 * (4 * 16 + 2 * 4), 0,
    ),
}  # fmt: skip
"""The seven models of a review, and one without any attention. Numbers are by hand."""


def caches_of(config: Any) -> list[LayerCache]:
    """The caches of a model without weights."""
    with without_weights():
        return layer_caches(t.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16))


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_models_keep_what_their_papers_say(name: str) -> None:
    model = PUBLISHED[name]
    caches = caches_of(model.config())
    state = sum(cache.state_bytes for cache in caches)
    assert state == model.state

    def held(tokens: int) -> float:
        return sum(cache.bytes(tokens) for cache in caches) - state

    assert held(1) == model.token
    assert held(LONG + 1) - held(LONG) == model.beyond
    assert held(LONG) == model.long
    work = sum(cache.step_operations(LONG) for cache in caches) - state
    assert work == model.attention
    shared = (
        2048 * 3 * (LONG + 4 * 512) if name == "Gemma 3n E4B" else 0
    )  # others keep what is read
    read = sum(cache.read_bytes(LONG) for cache in caches)
    assert read == held(LONG) + state + shared


def test_a_prompt_of_latent_attention_is_expanded() -> None:
    """Heads of 128 + 64 for keys and 128 for values; half of all pairs of tokens are seen."""
    caches = caches_of(PUBLISHED["DeepSeek-V2-Lite"].config())
    work = sum(cache.prompt_operations(1000) for cache in caches)
    assert work == 27 * 2 * 1000**2 / 2 * 16 * (192 + 128)


def test_pairs_of_a_window_by_counting() -> None:
    """Each token sees itself and those before it; the formula leaves half a token out."""
    cache = LayerCache(8, 8, window=10, width=8, step_width=8)
    for tokens in (5, 10, 37):
        pairs = sum(min(place, 10) - 0.5 for place in range(1, tokens + 1))
        assert cache.prompt_operations(tokens) / 16 == pytest.approx(pairs, abs=max(0, tokens - 10))
    assert LayerCache(8, 8, width=8).prompt_operations(37) == 16 * 37**2 / 2


CACHED_OTHERWISE = {
    "falcon new": "transformers repeats keys and values for every query head before it keeps them",
    "recurrent_gemma": "its layers keep their states themselves",
    "gemma3n vision": "needs timm",
    "llama4 vision": "does not run without a picture",
    "glm_moe_dsa": "its indexer keeps keys of its own, which are not counted",
    "deepseek_v4": "its indexer and its compressed states are not counted",
}
"""Families whose caches cannot be compared, and why."""

COMPARED = sorted({*CONFIGS, *DENSE, *HYBRIDS, *SEEING, *MIXTURES} - set(CACHED_OTHERWISE))


@pytest.mark.parametrize("family", COMPARED)
@pytest.mark.parametrize("tokens", [5, 20])  # within the windows of 8, and beyond
def test_transformers_keeps_the_same_bytes(family: str, tokens: int) -> None:
    model: Any = tiny_model(family).to(torch.bfloat16)
    with torch.no_grad():
        out = model(input_ids=tiny_windows(2, tokens), use_cache=True)
    held = sum(tensor.nbytes for layer in out.cache.layers for tensor in tensors_of(layer))
    between = (replace(one, window=one.window and one.window - 1) for one in layer_caches(model))
    assert held == 2 * sum(cache.bytes(tokens) for cache in between)


def tensors_of(layer: Any) -> list[torch.Tensor]:
    """Keys, values and states in a layer's cache."""
    found = [value for value in vars(layer).values() if torch.is_tensor(value) and value.ndim > 1]
    for states in (value for value in vars(layer).values() if isinstance(value, dict)):
        found += [value for value in states.values() if torch.is_tensor(value)]
    return found


def test_a_cut_of_heads_leaves_a_latent_vector_as_it_is() -> None:
    shape: ModelShape = counted("x", tiny_model("deepseek_v3"))
    narrow = shape.scaled(linears=0.5)
    assert narrow.cache_bytes(100) == shape.cache_bytes(100)
    plain: ModelShape = counted("x", tiny_model("llama"))
    assert plain.scaled(linears=0.5).cache_bytes(100) == plain.cache_bytes(100) / 2
    assert plain.scaled(layers=0.5).cache_bytes(100) == plain.cache_bytes(100) / 2


def test_where_names_are_unknown_the_configuration_says_the_size_of_a_head() -> None:
    model: Any = tiny_model("llama")
    plain = [cache.bytes(100) for cache in layer_caches(model)]
    for layer in model.model.layers:
        attention = layer.self_attn
        for own, other in (("k_proj", "keys"), ("v_proj", "values"), ("o_proj", "mix")):
            attention.add_module(other, getattr(attention, own))
            delattr(attention, own)
    model.config.head_dim = None
    assert [cache.bytes(100) for cache in layer_caches(model)] == plain


SIZES = {
    "vocab_size": 96, "hidden_size": 48, "num_hidden_layers": 4, "num_attention_heads": 6,
    "num_key_value_heads": 2, "pad_token_id": 0,
}  # fmt: skip
MIXTURE = {"num_local_experts": 6, "num_experts_per_tok": 3, "sliding_window": None}


@pytest.mark.parametrize(
    ("family", "more", "own"),
    [
        ("llama", {}, {}),
        ("llama", {"head_dim": 12, "tie_word_embeddings": True}, {"head": 12, "tied": True}),
        ("mixtral", MIXTURE, {"experts": 6, "experts_per_token": 3}),
    ],
)
def test_sizes_are_those_of_the_modules(family: str, more: dict, own: dict) -> None:
    config = t.AutoConfig.for_model(family, intermediate_size=80, **SIZES, **more)
    with without_weights():
        model = auto_class(config).from_config(config)
    open_experts(model)
    sizes = {"head": 8, **own}
    plain = PlainDecoder(layers=4, hidden=48, vocabulary=96, ffn=80, heads=6, kv_heads=2, **sizes)
    assert plain.shape("it") == counted("it", model)
