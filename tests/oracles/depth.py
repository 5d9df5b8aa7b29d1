"""Depth by brute force: models from which layers are really gone, and sums one token at a time."""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Iterable

import torch
import transformers
from torch import Tensor, nn


def without_layers(model: nn.Module, path: str, dropped: Iterable[int]) -> nn.Module:
    """A new model with fewer layers, whose weights are those of the layers that are left."""
    config = copy.deepcopy(model.config)
    count = config.num_hidden_layers
    kept = [i for i in range(count) if i not in set(dropped)]
    config.num_hidden_layers = len(kept)
    if getattr(config, "layer_types", None):
        config.layer_types = [config.layer_types[i] for i in kept]
    smaller = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    state = {}
    for name, value in model.state_dict().items():
        inside = re.match(re.escape(path) + r"\.(\d+)\.(.*)", name)
        if inside is None:
            state[name] = value
        elif int(inside[1]) in kept:
            state[f"{path}.{kept.index(int(inside[1]))}.{inside[2]}"] = value
    smaller.load_state_dict(state)
    return smaller


def divergence(dense: nn.Module, other: nn.Module, windows: Tensor) -> float:
    """Mean over tokens of Σ p · (log p − log q)."""
    total, count = 0.0, 0
    with torch.no_grad():
        for window in windows:
            p, q = (
                model(input_ids=window[None]).logits[0].double().log_softmax(-1)
                for model in (dense, other)
            )
            total += float((p.exp() * (p - q)).sum())
            count += len(window)
    return total / count


def cosines(one: Tensor, two: Tensor) -> list[float]:
    """The cosine of each token's two states [tokens, hidden]."""
    return [
        sum(x * y for x, y in zip(a, b, strict=True)) / math.hypot(*a) / math.hypot(*b)
        for a, b in zip(one.double().tolist(), two.double().tolist(), strict=True)
    ]


def influence(before: Tensor, behind: Tensor) -> float:
    """1 − mean cosine."""
    found = cosines(before, behind)
    return 1 - sum(found) / len(found)


def angle(before: Tensor, behind: Tensor) -> float:
    """Mean angle, in half turns."""
    found = [math.acos(max(-1.0, min(1.0, c))) / math.pi for c in cosines(before, behind)]
    return sum(found) / len(found)
