"""Oracles of attention with random weights, texts for them, and how the caches round."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from oracles.attention import Attention

CACHES = (torch.float32, torch.bfloat16, torch.int8)
CAPACITY = 700


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def angles(rotary: int) -> dict[str, Tensor]:
    turns = torch.arange(CAPACITY)[:, None] / 10 ** (torch.arange(rotary // 2) / 4)
    return {"cosine": turns.cos(), "sine": turns.sin()}


def oracle_of(heads: int = 4, groups: int = 2, head: int = 16, **kinds: Any) -> Attention:
    """An oracle; `rotary`, `norm`, `biases` and `sinks` say which weights it has."""
    rotary = kinds.pop("rotary", head)
    plain = Attention(heads, groups, head, scale=1.3 * head**-0.5)
    found: dict[str, Any] = angles(rotary) if rotary else {}
    if kinds.pop("sinks", False):
        found["sinks"] = random(heads, seed=5)
    if kinds.pop("biases", False):
        for i, (name, count) in enumerate({"q": heads, "k": groups, "v": groups}.items()):
            found[f"{name}_bias"] = random(count * head, seed=6 + i)
    if norm := kinds.get("norm"):
        for i, (name, count) in enumerate({"q": heads, "k": groups}.items()):
            weight = 1 + 0.3 * random(1 if norm == "head" else count, head, seed=9 + i)
            found[f"{name}_norm"] = weight.flatten() if norm == "whole" else weight
    return replace(plain, **found, **kinds)


def a_text(oracle: Attention, tokens: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    counts = (oracle.heads, oracle.groups, oracle.groups)
    q, k, v = (random(tokens, n, oracle.head, seed=seed + i) for i, n in enumerate(counts))
    return q, k, v


def rounding(dtype: torch.dtype) -> Any:
    """What a cache keeps of heads [tokens, heads, head]."""

    def of(x: Tensor) -> Tensor:
        if dtype != torch.int8:
            return x.float().to(dtype).double()
        scale = x.float().abs().amax(-1, keepdim=True) / 127
        return ((x.float() / scale).round().clamp(-127, 127) * scale).double()

    return of
