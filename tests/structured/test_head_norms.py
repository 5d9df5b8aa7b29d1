"""Norms of queries and keys, when heads are cut that they run over, and when the stream is cut."""

from __future__ import annotations

from math import sqrt
from typing import Any

import pytest
import torch
from cuts import close, cut_quietly, logits, odd
from slow import slow
from zoo import tiny_model, tiny_windows

from oracles.masking import narrow_weights
from secateur.structured.cut import Cut
from secateur.structured.surgery import cut_model

HEADS, KEPT, SIZE = 8, 4, 8
HALF = Cut(groups={i: tuple(range(KEPT)) for i in range(3)})


def olmo(seed: int) -> Any:
    sizes = {"hidden_size": 64, "intermediate_size": 96}
    return tiny_model("olmo2", seed, **sizes, num_attention_heads=HEADS, num_key_value_heads=HEADS)


def unread(model: Any) -> torch.Tensor:
    """The outputs with the heads that go still there, and read by nobody."""
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight[:, KEPT * SIZE :] = 0.0
    return logits(model, tiny_windows())


def test_exact_where_the_heads_that_go_are_as_large_as_those_that_stay() -> None:
    model = olmo(0)
    with torch.no_grad():
        for layer in model.model.layers:
            for name in ("q_proj", "k_proj"):
                weight = layer.self_attn.get_submodule(name).weight
                weight[KEPT * SIZE :] = weight[: KEPT * SIZE]
    smaller = cut_model(model, HALF)
    assert close(logits(smaller, tiny_windows()), unread(model))


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_less_is_lost_than_with_the_factor_of_a_cut_stream(seed: int) -> None:
    model = olmo(seed)
    plain, other = (cut_model(model, HALF) for _ in range(2))
    with torch.no_grad():
        for name, weight in other.named_parameters():
            if "q_norm" in name or "k_norm" in name:
                weight.mul_(sqrt(2))
    expected = unread(model)
    errors = [
        float((logits(x, tiny_windows()) - expected).norm() / expected.norm())
        for x in (plain, other)
    ]
    assert errors[0] < 0.25
    assert errors[1] > 0.5


@pytest.mark.parametrize(
    "family",
    ["qwen3", "gemma3", "olmo2", "exaone4", "llama4", slow("hunyuan"), slow("olmo3"),
     slow("qwen3_moe"), slow("olmoe"), slow("glm4_moe"), slow("dots1"), slow("minimax_m2"),
     slow("hunyuan_v1_moe")],
)  # fmt: skip
def test_a_large_epsilon_does_not_grow_with_a_narrower_stream(family: str) -> None:
    channels = odd(32)
    model, masked = (tiny_model(family, rms_norm_eps=1e-2) for _ in range(2))
    smaller = cut_quietly(model, Cut(hidden=channels))
    narrow_weights(masked, 32, list(channels))
    found, expected = (logits(x, tiny_windows()) for x in (smaller, masked))
    assert float((found - expected).abs().max()) <= 1e-5 * float(expected.abs().max())
