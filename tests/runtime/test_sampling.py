"""Sampling against the definitions of top-k and top-p, counted over many draws."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np
import pytest
import torch
from with_kernels import needs_kernels

from runtime.kernel_examples import TIERS
from secateur.errors import KernelError, NumericalError, RecipeError
from secateur.recipes.deploy import Sampling
from secateur.runtime.kernels.library import kernel_info, use_tier
from secateur.runtime.sampling import Chances, Draws, sampling_with

Result = TypeVar("Result")
CHANCES = torch.tensor([0.1, 0.5, 0.05, 0.25, 0.1])


def drawn(count: int = 4000, **options: Any) -> dict[int, float]:
    """How often each token is drawn."""
    draws = Draws(Sampling(temperature=1.0, **options))
    found = Counter(draws.draw(CHANCES.log()) for _ in range(count))
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
        ({"min_p": 0.19}, {0, 1, 3, 4}),  # 0.095 or more
        ({"min_p": 0.21}, {1, 3}),
        ({"min_p": 1.0}, {1}),
        ({"min_p": 0.19, "top_k": 3}, {0, 1, 3}),
        ({"min_p": 0.19, "top_p": 0.5}, {1}),
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


def test_a_draw_from_many_tokens_is_in_proportion() -> None:
    """Of three blocks, the last one not full, and of tokens within them."""
    chances = torch.full((1300,), 1e-4)
    chances[torch.tensor([0, 511, 512, 1299])] = torch.tensor([0.1, 0.2, 0.3, 0.2])
    draws = Draws(Sampling(temperature=1.0))
    found = Counter(draws.draw(chances.log()) for _ in range(3000))
    for token in (0, 511, 512, 1299):
        assert found[token] / 3000 == pytest.approx(float(chances[token] / chances.sum()), abs=0.03)
    assert len(found) > 100
    one = torch.full((1300,), -torch.inf)
    one[700] = 3.0
    assert {draws.draw(one) for _ in range(50)} == {700}


def test_temperature() -> None:
    logits = CHANCES.log()
    assert Draws(Sampling(top_k=3)).draw(logits) == 1
    cold = Draws(Sampling(temperature=0.01))
    assert {cold.draw(logits) for _ in range(20)} == {1}


def test_the_seed_decides() -> None:
    def text(seed: int) -> list[int]:
        draws = Draws(Sampling(temperature=1.0, top_p=0.9, seed=seed))
        return [draws.draw(CHANCES.log()) for _ in range(30)]

    assert text(1) == text(1)
    assert text(1) != text(2)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"temperature": math.nan}, "--temperature nan"),
        ({"temperature": math.inf}, "--temperature inf"),
        ({"temperature": -0.1}, "--temperature"),
        ({"top_k": -1}, "--top-k -1"),
        ({"top_p": 0.0}, "--top-p 0.0"),
        ({"top_p": 1.01}, "--top-p"),
        ({"top_p": math.nan}, "--top-p nan"),
        ({"seed": -1}, "--seed -1"),
        ({"seed": 2**63}, "--seed"),
        ({"min_p": -0.1}, "--min-p -0.1"),
        ({"min_p": math.nan}, "--min-p nan"),
        ({"repetition_penalty": 0.0}, "--repetition-penalty 0.0"),
        ({"presence_penalty": math.inf}, "--presence-penalty inf"),
        ({"frequency_penalty": math.nan}, "--frequency-penalty nan"),
    ],
)
def test_numbers_out_of_range_are_refused(options: dict[str, Any], named: str) -> None:
    with pytest.raises(RecipeError, match=named) as raised:
        sampling_with({}, options)
    assert raised.value.exit_code == 2


@pytest.mark.parametrize(
    "options",
    [
        {"top_k": 40},
        {"top_p": 0.3},
        {"top_p": 0.9999},
        {"min_p": 0.05},
        {"min_p": 1e-9, "top_p": 0.5},
        {"top_k": 1500, "top_p": 0.99},
    ],
)
def test_a_large_vocabulary_keeps_what_the_definition_keeps(options: dict[str, Any]) -> None:
    """Most draws look at the likeliest tokens only, and must not forget any that count."""
    logits = 2 * torch.randn(5000, generator=torch.Generator().manual_seed(0))
    chances = logits.double().softmax(-1)
    ordered, tokens = chances.sort(descending=True)
    ordered = ordered[: options.get("top_k")]
    ordered = ordered / ordered.sum()
    likelier = ordered.cumsum(0) - ordered  # the sum of all before it
    counts = likelier < options.get("top_p", 1.0)
    counts &= ordered >= options.get("min_p", 0.0) * ordered[0]
    kept = tokens[: len(ordered)][counts].tolist()
    draws = Draws(Sampling(temperature=1.0, **options))
    found = Counter(draws.draw(logits) for _ in range(3000))
    assert set(found) <= set(kept)
    share = float(chances[kept[0]] / chances[kept].sum())
    assert found[kept[0]] / 3000 == pytest.approx(share, abs=0.03)
    assert len(found) > min(len(kept), 600) // 2


def test_penalties_are_those_of_the_papers() -> None:
    """Against the formulas, written out token by token."""
    logits = torch.tensor([2.0, -1.0, 1.5, 3.0, -2.0, 2.5])
    prompt, r, p, f = [0, 1, 1], 1.25, 0.5, 0.25
    penalties = Sampling(repetition_penalty=r, presence_penalty=p, frequency_penalty=f)
    draws = Draws(penalties, prompt)
    text: list[int] = []
    for _ in range(12):
        expected = []
        for token, value in enumerate(logits.tolist()):
            if token in prompt + text:
                value = value / r if value > 0 else value * r
            count = text.count(token)
            expected.append(value - f * count - (p if count else 0.0))
        best = max(range(6), key=lambda token: expected[token])
        assert draws.draw(logits) == best
        text.append(best)
    assert len({*text}) > 2
    assert logits.tolist() == [2.0, -1.0, 1.5, 3.0, -2.0, 2.5]  # the argument is untouched


def test_the_repetition_penalty_is_that_of_transformers() -> None:
    from transformers import RepetitionPenaltyLogitsProcessor

    logits = torch.randn(50, generator=torch.Generator().manual_seed(1))
    prompt = [3, 9, 9, 20]
    expected = RepetitionPenaltyLogitsProcessor(1.3)(torch.tensor([prompt]), logits[None].clone())
    found = Draws(Sampling(repetition_penalty=1.3), prompt).penalised(logits.numpy())
    assert torch.equal(torch.from_numpy(found), expected[0])


FEW: tuple[dict[str, Any], ...] = ({"top_k": 40}, {"top_p": 0.3}, {"min_p": 0.05})
SHAPES: tuple[dict[str, Any], ...] = (
    {},
    {"temperature": 0.3},
    *FEW,
    {"top_k": 5000},
    {"top_p": 0.9999},
    {"min_p": 1e-9, "top_p": 0.5},
    {"top_k": 700, "top_p": 0.99, "temperature": 1.7},
)


def uneven(count: int, seed: int = 0) -> torch.Tensor:
    """Logits of which some are equal, and some are -inf."""
    logits = 2 * torch.randn(count, generator=torch.Generator().manual_seed(seed))
    logits[::3] = logits[::3].round()
    logits[1::50] = -torch.inf
    return logits


def probabilities(logits: torch.Tensor, options: dict[str, Any]) -> torch.Tensor:
    """Top-k, top-p and min-p in float64, written out token by token."""
    chances = (logits.double() / options.get("temperature", 1.0)).softmax(-1)
    order = sorted(range(len(chances)), key=lambda token: (-chances[token], token))
    order = order[: options.get("top_k")]
    whole, before, kept = float(chances[order].sum()), 0.0, []
    for token in order:
        if before >= options.get("top_p", 1.0) * whole:
            break
        if chances[token] < options.get("min_p", 0.0) * chances[order[0]]:
            break
        kept.append(token)
        before += float(chances[token])
    found = torch.zeros_like(chances)
    found[kept] = chances[kept] / chances[kept].sum()
    return found


def with_every_tier(compute: Callable[[], Result]) -> list[Result]:
    """What comes out with each of this processor's instruction sets."""
    best, found = kernel_info().tier, []
    for tier in {*TIERS, best}:
        try:
            use_tier(tier)
        except KernelError:
            continue
        found.append(compute())
    use_tier(best)
    return found


@needs_kernels
@pytest.mark.parametrize("options", SHAPES, ids=str)
def test_the_kernels_have_the_probabilities_of_the_definition(options: dict[str, Any]) -> None:
    """And the same bits with every instruction set."""
    logits = uneven(1300)
    draws = Draws(Sampling(**{"temperature": 1.0, **options}))

    def compute() -> list[float]:
        chances = Chances(draws, logits.numpy())
        assert chances.token == int(logits.argmax())
        assert chances.sure == chances.of(chances.token)
        return [chances.of(token) for token in range(1300)]

    first, *others = with_every_tier(compute)
    assert all(other == first for other in others)
    found, expected = torch.tensor(first, dtype=torch.float64), probabilities(logits, options)
    assert abs(float(found.sum()) - 1) < 1e-7
    assert torch.equal(found > 0, expected > 0)
    assert torch.allclose(found, expected, rtol=1e-5, atol=0)


@needs_kernels
@pytest.mark.parametrize("options", [{}, {"temperature": 0.3}, *FEW], ids=str)
@pytest.mark.parametrize("count", [9, 512, 5000])
def test_a_seed_gives_the_same_text_without_kernels(options: dict[str, Any], count: int) -> None:
    """But for the order of tokens whose probabilities are equal to rounding."""
    texts = []
    for by_kernels in (True, False):
        draws = Draws(Sampling(**{"temperature": 1.0, **options, "seed": 7}))
        draws.by_kernels = by_kernels
        texts.append([draws.draw(uneven(count, seed)) for seed in range(60)])
    assert texts[0] == texts[1]


@needs_kernels
@pytest.mark.parametrize("options", [{}, {"top_k": 30}, {"top_p": 0.8}], ids=str)
@pytest.mark.parametrize("head", [None, 300])
def test_what_a_draft_leaves_is_drawn_by_its_sums(
    options: dict[str, Any], head: int | None
) -> None:
    """Against sums in float64, with a draft that proposes any token or 300 of them."""
    logits, sampling = uneven(1300), Sampling(temperature=1.0, **options)
    guessed = logits + torch.randn(1300, generator=torch.Generator().manual_seed(3))
    draws, ids = Draws(sampling), torch.arange(head or 1300) * (4 if head else 1)
    p = Chances(draws, logits.numpy())
    q = Chances(draws, guessed[ids].numpy(), None if head is None else ids.numpy())
    assert sum(q.of(token) for token in range(1300)) == pytest.approx(1, abs=1e-7)
    assert head is None or q.of(5) == 0
    left = np.array([max(p.of(token) - q.of(token), 0.0) for token in range(1300)])

    def place(shares: Any, part: float) -> int:
        return int((shares.cumsum() <= part * shares.sum()).sum())

    for block, part in np.random.default_rng(0).random((1000, 2)):
        if p.c.keeps:  # the likeliest first
            order = sorted(left.nonzero()[0], key=lambda token: (-p.of(token), token))
            points, expected = iter([part]), order[place(left[order], part)]
        else:
            begin = 512 * place(np.add.reduceat(left, [0, 512, 1024]), block)
            points = iter([block, part])
            expected = begin + place(left[begin : begin + 512], part)
        draws.point = points.__next__  # type: ignore[method-assign]
        assert p.draw(less=q) == expected


@needs_kernels
def test_of_equal_distributions_nothing_is_left_so_one_is_drawn_from_them() -> None:
    draws = Draws(Sampling(temperature=1.0))
    p, q = (Chances(draws, CHANCES.log().numpy()) for _ in range(2))
    found = Counter(p.draw(less=q) for _ in range(2000))
    assert found[1] / 2000 == pytest.approx(0.5, abs=0.05)


@needs_kernels
@pytest.mark.parametrize("options", [{}, {"top_k": 2}, {"top_p": 0.5}, {"min_p": 0.1}], ids=str)
@pytest.mark.parametrize("count", [1, 5, 1300])
def test_one_token_that_is_left_and_numbers_that_are_none(
    options: dict[str, Any], count: int
) -> None:
    def compute() -> None:
        draws = Draws(Sampling(temperature=1.0, **options))
        one = torch.full((count,), -torch.inf)
        with pytest.raises(NumericalError):
            draws.draw(one)
        one[count // 2] = -3.0
        assert {draws.draw(one) for _ in range(20)} == {count // 2}
        assert Chances(draws, one.numpy()).of(count // 2) == 1.0
        for wrong in (torch.nan, torch.inf):
            for place in {0, count // 2, count - 1}:
                odd = torch.zeros(count)
                odd[place] = wrong
                with pytest.raises(NumericalError):
                    draws.draw(odd)

    assert with_every_tier(compute)
