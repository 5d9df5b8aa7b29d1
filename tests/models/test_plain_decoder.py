"""Sizes written down by hand, against the modules that transformers builds of them."""

from __future__ import annotations

import pytest
from transformers import AutoConfig

from secateur.models.counting import counted
from secateur.models.experts import open_experts
from secateur.models.plain_decoder import PlainDecoder
from secateur.models.skeleton import auto_class, without_weights

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
    config = AutoConfig.for_model(family, intermediate_size=80, **SIZES, **more)
    with without_weights():
        model = auto_class(config).from_config(config)
    open_experts(model)
    sizes = {"head": 8, **own}
    plain = PlainDecoder(layers=4, hidden=48, vocabulary=96, ffn=80, heads=6, kv_heads=2, **sizes)
    assert plain.shape("it") == counted("it", model)
