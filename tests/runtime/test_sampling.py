"""Sampling against the definitions of top-k and top-p, counted over many draws."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import pytest
import torch

from secateur.errors import RecipeError
from secateur.runtime.sampling import Sampling

CHANCES = torch.tensor([0.1, 0.5, 0.05, 0.25, 0.1])


def drawn(count: int = 4000, **options: Any) -> dict[int, float]:
    """How often each token is drawn."""
    sampling = Sampling(1.0, **options)
    generator = sampling.generator()
    found = Counter(sampling.draw(CHANCES.log(), generator) for _ in range(count))
    return {token: n / count for token, n in found.items()}


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        ({}, {0, 1, 2, 3, 4}),
        ({"top_k": 2}, {1, 3}),
        ({"top_k": 99}, {0, 1, 2, 3, 4}),
        ({"top_p": 0.5}, {1}),
        ({"top_p": 0.51}, {1, 3}),
        ({"top_p": 0.8}, {0, 1, 3}),  # 0.5 + 0.25 is not enough; the earlier of equal ones
        ({"top_p": 1e-9}, {1}),
        ({"top_k": 2, "top_p": 0.6}, {1}),  # 0.5 of 0.75 is two thirds
    ],
)
def test_only_the_kept_tokens_are_drawn_in_proportion(
    options: dict[str, Any], kept: set[int]
) -> None:
    found = drawn(**options)
    assert found.keys() == kept
    total = float(CHANCES[sorted(kept)].sum())
    for token, share in found.items():
        assert share == pytest.approx(float(CHANCES[token]) / total, abs=0.04)


def test_temperature() -> None:
    logits, zero = CHANCES.log(), Sampling(0.0, top_k=3)
    assert zero.draw(logits, zero.generator()) == 1
    cold = Sampling(0.01)
    assert {cold.draw(logits, cold.generator()) for _ in range(20)} == {1}


def test_the_seed_decides() -> None:
    def text(seed: int) -> list[int]:
        sampling = Sampling(1.0, top_p=0.9, seed=seed)
        generator = sampling.generator()
        return [sampling.draw(CHANCES.log(), generator) for _ in range(30)]

    assert text(1) == text(1)
    assert text(1) != text(2)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"temperature": math.nan}, "--temperature nan"),
        ({"temperature": math.inf}, "--temperature inf"),
        ({"temperature": -0.1}, "--temperature"),
        ({"top_k": 0}, "--top-k 0"),
        ({"top_p": 0.0}, "--top-p 0.0"),
        ({"top_p": 1.01}, "--top-p"),
        ({"top_p": math.nan}, "--top-p nan"),
        ({"seed": -1}, "--seed -1"),
        ({"seed": 2**63}, "--seed"),
    ],
)
def test_numbers_out_of_range_are_refused(options: dict[str, Any], named: str) -> None:
    with pytest.raises(RecipeError, match=named) as raised:
        Sampling(**options)
    assert raised.value.exit_code == 2
