"""Acceptance against an oracle in float64, one token at a time, and against rejection sampling."""

from __future__ import annotations

import itertools
import math
import random

import pytest
import torch
from torch import nn
from zoo import tiny_model, tiny_windows

from secateur.errors import NumericalError
from secateur.evaluation import perplexity as room
from secateur.evaluation.acceptance import Chains, acceptance, chained_acceptance, speculation
from secateur.runs.measured import Drawing, Speculation


def pair(family: str) -> tuple[nn.Module, nn.Module]:
    """A draft and its parent: they differ as a pruned model and a dense one do."""
    torch.manual_seed(3)
    draft, parent = tiny_model(family), tiny_model(family)
    with torch.no_grad():
        for weight in parent.parameters():
            weight.mul_(4.0 if weight.dim() == 2 else 1.0)  # so that it prefers some tokens
        for own, dense in zip(draft.parameters(), parent.parameters(), strict=True):
            own.copy_(dense * (torch.rand_like(dense) > 0.1) if own.dim() == 2 else dense)
    return draft, parent


def probabilities(model: nn.Module, ids: torch.Tensor) -> list[float]:
    """Of the token after these, in float64."""
    found: list[float] = torch.softmax(model.double()(ids[None]).logits[0, -1], -1).tolist()
    model.float()
    return found


def oracle(
    draft: nn.Module, parent: nn.Module, windows: torch.Tensor, only: list[int]
) -> tuple[list[list[float]], list[list[bool]]]:
    """a_t and agreement of every window: loops over tokens and over the vocabulary."""
    rates, agreements = [], []
    with torch.no_grad():
        for window in windows:
            own, same = [], []
            for t in range(1, len(window)):
                q, p = (probabilities(model, window[:t]) for model in (draft, parent))
                whole = sum(q[x] for x in only)
                own.append(sum(min(p[x], q[x] / whole) for x in only))
                same.append(p.index(max(p)) == max(only, key=lambda x: q[x]))
            rates.append(own)
            agreements.append(same)
    return rates, agreements


def run_of(values: list[list[float]], k: int) -> float:
    """The mean over all places with k values of their product."""
    products = []
    for window in values:
        for t in range(len(window) - k + 1):
            product = 1.0
            for j in range(k):
                product *= window[t + j]
            products.append(product)
    return sum(products) / len(products)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
@pytest.mark.parametrize("chunk_tokens", [5, 1000])
def test_against_the_oracle(family: str, chunk_tokens: int, monkeypatch) -> None:
    draft, parent = pair(family)
    windows = tiny_windows(5, 10)
    monkeypatch.setattr(room, "LOGITS_BYTES", 96 * 4 * chunk_tokens)
    only = list(range(0, 96, 2))
    whole, some = acceptance(draft, parent, windows, heads=[None, torch.tensor(only)], batch_size=2)
    for got, ids in ((whole, list(range(96))), (some, only)):
        rates, same = oracle(draft, parent, windows, ids)
        means = [sum(window) / len(window) for window in rates]
        spread = (sum((x - sum(means) / 5) ** 2 for x in means) / 4 / 5) ** 0.5
        assert got.mean == pytest.approx(sum(means) / 5, rel=1e-5)
        assert got.standard_error == pytest.approx(spread, rel=1e-3)
        greedy = [[float(x) for x in window] for window in same]
        assert got.agreement == pytest.approx(run_of(greedy, 1))
        assert got.tokens == 5 * 9
        for k in range(1, 8):
            expected = sum(run_of(rates, i) for i in range(1, k + 1))
            assert sum(got.runs[:k]) == pytest.approx(expected, rel=1e-5)
            expected = sum(run_of(greedy, i) for i in range(1, k + 1))
            assert sum(got.greedy_runs[:k]) == pytest.approx(expected)
    assert 0.2 < some.mean < whole.mean < 0.999


def test_rejection_sampling_takes_so_many() -> None:
    draft, parent = pair("llama")
    window = tiny_windows(1, 3)[0]
    with torch.no_grad():
        q, p = (probabilities(model, window[:2]) for model in (draft, parent))
    generator, draws = random.Random(0), 50_000
    taken = sum(
        generator.random() * q[x] < p[x] for x in generator.choices(range(96), weights=q, k=draws)
    )
    # the windows before the last position have the same prefix, so position 1 is this one
    both = acceptance(draft, parent, window[None])[0]
    alone = acceptance(draft, parent, window[None, :2])[0]
    expected = 2 * both.mean - alone.mean
    assert taken / draws == pytest.approx(expected, abs=4 * (0.25 / draws) ** 0.5)
    assert expected < 0.95


def test_a_model_takes_all_of_its_own_text() -> None:
    model = tiny_model("qwen2")
    steps: list[tuple[int, int]] = []
    [got] = acceptance(
        model, model, tiny_windows(1, 9), progress=lambda done, total: steps.append((done, total))
    )
    assert (got.mean, got.agreement) == (pytest.approx(1.0, abs=1e-6), 1.0)
    assert sum(got.greedy_runs) == 7.0
    assert got.standard_error is None
    assert steps == [(1, 1)]


def test_start_tokens_are_not_predicted() -> None:
    draft, parent = pair("llama")
    windows = tiny_windows(2, 8)
    rates, _ = oracle(draft, parent, windows, list(range(96)))
    [got] = acceptance(draft, parent, windows, start_tokens=3)
    assert got.tokens == 2 * 5
    assert got.mean == pytest.approx(run_of([window[2:] for window in rates], 1), rel=1e-5)
    assert got.runs[5:] == (0.0, 0.0)  # no window has so many


def test_not_a_number() -> None:
    draft, parent = pair("llama")
    with torch.no_grad():
        draft.model.norm.weight.fill_(float("nan"))
    with pytest.raises(NumericalError, match="window 0 of 2"):
        acceptance(draft, parent, tiny_windows(2, 6))


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.8, 0.95, 1.0])
@pytest.mark.parametrize("draft_seconds", [0.02, 0.3, 0.6])
@pytest.mark.parametrize("drawing", [Drawing(0.0, 0.0), Drawing(0.2, 0.4)], ids=str)
def test_speed_by_simulation(rate: float, draft_seconds: float, drawing: Drawing) -> None:
    """Every token of the text is drawn, and every proposed one."""
    costs = [1.0 + 0.1 * n for n in range(8)]
    runs = [rate**i for i in range(1, 8)]
    got = speculation(runs, costs, draft_seconds, drawing=drawing)
    speedups = []
    for k in range(8):
        generator, tokens, seconds = random.Random(k), 0, 0.0
        for _ in range(20_000):
            seconds += k * (draft_seconds + drawing.proposed) + costs[k] + drawing.judged
            tokens += 1
            for _ in range(k):
                if generator.random() >= rate:
                    break
                seconds += drawing.judged
                tokens += 1
        speedups.append(tokens / seconds * (costs[0] + drawing.judged))
    assert got.speedup == pytest.approx(max(speedups), rel=0.02)
    assert speedups[got.k] == pytest.approx(max(speedups), rel=0.02)
    assert got.accepted == pytest.approx(sum(rate**i for i in range(1, got.k + 1)))


def test_no_draft_is_the_answer_where_none_pays() -> None:
    assert speculation([0.5, 0.25], [1.0, 1.5, 2.0], 0.9) == Speculation(0, 0.0, 1.0)


@pytest.mark.parametrize(("start", "first"), [(0, 0), (4, 2)])
def test_chains_are_followed_one_by_one(start: int, first: int) -> None:
    """Against a loop over windows, positions and places; two batches, drafts and heads."""
    torch.manual_seed(0)
    places, positions, vocabulary = 3, 5, 8
    draft, parent = torch.randn(4, vocabulary), torch.randn(4, vocabulary)
    some = torch.tensor([1, 2, 5])

    def batch(windows: int) -> Chains:
        own = [torch.randn(windows, positions, 4) for _ in range(places)]
        states = torch.randn(windows, positions + places, 4)
        worse = own, lambda x: x @ -draft
        return Chains([(own, lambda x: x @ draft), worse], states, lambda x: x @ parent)

    batches = [batch(2), batch(1)]
    found = chained_acceptance(batches, heads=(None, some), start_tokens=start)
    kinds = itertools.product((draft, -draft), (torch.arange(vocabulary), some))
    for result, (own, ids) in zip(found, kinds, strict=True):
        chains = []
        for one in batches:
            for window in range(len(one.states)):
                for t in range(first, positions):
                    p = [
                        (one.states[window, t + 1 + i] @ parent).softmax(-1) for i in range(places)
                    ]
                    read = [one.drafts[0][0][i][window, t] for i in range(places)]
                    q = [(x @ own)[ids].softmax(-1) for x in read]
                    pairs = [*zip(p, q, strict=True)]
                    taken = [torch.minimum(x[ids], y).sum().item() for x, y in pairs]
                    same = [float(x.argmax() == ids[y.argmax()]) for x, y in pairs]
                    chains.append((taken, same))
        for i in range(places):
            for runs, kind in ((result.runs, 0), (result.greedy_runs, 1)):
                products = [math.prod(chain[kind][: i + 1]) for chain in chains]
                assert runs[i] == pytest.approx(sum(products) / len(products), abs=1e-6)
        assert result.mean == pytest.approx(result.runs[0], abs=1e-6)
        assert result.tokens == len(chains)
