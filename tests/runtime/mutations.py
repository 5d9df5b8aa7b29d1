"""JSON that is changed somewhere."""

from __future__ import annotations

import random
from typing import Any

ODD: list[Any] = [
    None, True, -1, 0, 1, 2**31, 2**63, 2**64, 10**30, 0.5, "", "x", "2:4", "int8", "int4",
    "bitmask", "BF16", "F16", "U8", [], [0], [-1, 4], [2**40, 2**40], [2**63], [1, 1, 1], {},
    {"a": 1}, "\ud800", "../model.safetensors", [[]], "zstd", "zstd-3", "none", "ffffffff",
]  # fmt: skip


def anywhere(draw: random.Random, value: Any) -> Any:
    """The same JSON, with one thing in it changed, removed, added or put elsewhere."""
    if isinstance(value, dict) and value and draw.random() < 0.9:
        key = draw.choice(sorted(value))
        how = draw.random()
        if how < 0.1:
            return {k: v for k, v in value.items() if k != key}
        if how < 0.2:
            return {**value, draw.choice(["added", key + "x", "layer.none"]): value[key]}
        if how < 0.3:
            other = draw.choice(sorted(value))
            return {**value, key: value[other], other: value[key]}
        return {**value, key: anywhere(draw, value[key])}
    if isinstance(value, list) and value and draw.random() < 0.7:
        at = draw.randrange(len(value))
        return [*value[:at], anywhere(draw, value[at]), *value[at + 1 :]]
    if type(value) is int and draw.random() < 0.7:
        return value + draw.choice([-8, -1, 1, 4, 8, value, 2**32, 2**62])
    return draw.choice(ODD)
