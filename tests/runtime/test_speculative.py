"""A text with a draft is the same as without, or has the same distribution."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from scipy.stats import chisquare
from with_kernels import needs_kernels

import secateur
from runtime.packed_models import Eager, packed_model, settled
from secateur.errors import ArchitectureError, CheckpointError, RecipeError
from secateur.models.tokenizer import load_tokenizer
from secateur.recipes.deploy import Sampling
from secateur.runtime.decode import Decoder, SlotDecoder, Token, continued
from secateur.runtime.sampling import Chances, Draws
from secateur.runtime.speculative import (
    CallSeconds,
    DraftedText,
    Drafter,
    Guess,
    Pace,
    accepted_or_drawn,
    frequent_tokens,
    guessed,
    open_drafter,
    speculated,
    verified,
)

pytestmark = [needs_kernels, pytest.mark.usefixtures("settled")]
__all__ = ["settled"]

ROOM = 80
GREEDY = Sampling(temperature=0.0)


def parent_and_draft(
    folder: Path, family: str = "llama", dtype: torch.dtype = torch.bfloat16
) -> tuple[Any, Any]:
    """A model in bfloat16, and the same one with weights of 4 bits and half of them zero."""
    parent = packed_model(
        folder / "parent", family, values="bfloat16", sparsity=0.02, dtype=dtype, head_dim=16
    )
    draft = packed_model(
        folder / "draft", family, values="int4", group_size=32, sparsity=0.1, dtype=dtype,
        head_dim=16,
    )  # fmt: skip
    return secateur.load(parent), secateur.load(draft)


def drafter_of(draft: Any, slots: int = 1, ids: torch.Tensor | None = None) -> Drafter:
    decoder = SlotDecoder(draft, ROOM, slots, head=ids)
    drafter = Drafter(decoder, decoder.vocabulary, ids)
    drafter.pace = Eager()
    return drafter


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen3", "gemma3"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_greedy_text_is_the_same(tmp_path: Path, family: str, dtype: torch.dtype) -> None:
    parent, draft = parent_and_draft(tmp_path, family, dtype)
    drafter = drafter_of(draft)
    for seed in range(3):
        ids = torch.randint(3, 96, (5,), generator=torch.Generator().manual_seed(seed))
        expected = [*continued(Decoder(parent, ROOM), ids, 40)]
        found = [*speculated(Decoder(parent, ROOM), drafter, ids, 40, sampling=GREEDY)]
        assert found == expected
    assert 0 < drafter.accepted < drafter.proposed


PENALTIES = [{"repetition_penalty": 1.3}, {"presence_penalty": 0.4, "frequency_penalty": 0.7}]


@pytest.mark.parametrize("options", PENALTIES, ids=str)
def test_penalties_count_proposed_tokens(tmp_path: Path, options: dict[str, float]) -> None:
    parent, draft = parent_and_draft(tmp_path)
    sampling, ids = Sampling(temperature=0.0, **options), torch.tensor([5, 17, 80])
    expected = [*continued(Decoder(parent, ROOM), ids, 40, sampling=sampling)]
    drafter = drafter_of(draft)
    assert [*speculated(Decoder(parent, ROOM), drafter, ids, 40, sampling=sampling)] == expected
    assert drafter.accepted > 0


def test_a_draft_that_is_the_parent_is_always_right(tmp_path: Path) -> None:
    parent, _ = parent_and_draft(tmp_path)
    for sampling in (GREEDY, Sampling(temperature=1.0)):
        drafter, decoder = drafter_of(parent), Decoder(parent, ROOM)
        found = [*speculated(decoder, drafter, torch.tensor([5]), 33, sampling=sampling)]
        assert len(found) == 33
        assert drafter.accepted == drafter.proposed == 28  # 1 token, then 4 times 7 and 1


def test_stop_tokens_and_limits(tmp_path: Path) -> None:
    parent, draft = parent_and_draft(tmp_path)
    ids = torch.tensor([5, 17, 80])
    expected = [*continued(Decoder(parent, ROOM), ids, 30)]
    for number in (1, 2, 9):
        found = speculated(Decoder(parent, ROOM), drafter_of(draft), ids, number, sampling=GREEDY)
        assert [*found] == expected[:number]
    stop = expected[11]
    decoder, drafter = Decoder(parent, ROOM), drafter_of(draft)
    found = speculated(decoder, drafter, ids, 30, sampling=GREEDY, stop={stop})
    assert [*found] == expected[: expected.index(stop)]


def test_a_conversation_goes_on_where_it_ended(tmp_path: Path) -> None:
    """Also after a text that was left in the middle of a proposal."""
    parent, draft = parent_and_draft(tmp_path)
    decoder, drafter = Decoder(parent, ROOM, continues=True), drafter_of(draft)
    text = [5, 17, 80]
    for number in (9, 4, 11):
        found = speculated(decoder, drafter, torch.tensor(text), 30, sampling=GREEDY)
        text += [next(found) for _ in range(number)]
        found.close()
        text.append(number)
    expected = [*continued(Decoder(parent, ROOM), torch.tensor(text), 10)]
    found = speculated(decoder, drafter, torch.tensor(text), 10, sampling=GREEDY)
    assert [*found] == expected


SHAPE = {
    "temperature": {"temperature": 0.7},
    "plain": {"temperature": 1.0},
    "top_k": {"temperature": 1.5, "top_k": 4},
    "top_p": {"temperature": 1.2, "top_p": 0.7},
    "min_p": {"temperature": 1.3, "min_p": 0.2},
}


def check_draws(options: dict[str, Any], draft: str, count: int) -> None:
    """Draws from nine tokens, and what a slow calculation says of accepted ones."""
    random = torch.Generator().manual_seed(3)
    logits = 2 * torch.randn(9, generator=random)
    noise = torch.randn(9, generator=random)
    guessed = {"near": logits + 0.3 * noise, "far": logits + 3 * noise, "opposite": -logits}[draft]
    draws = Draws(Sampling(**options, seed=5))
    parent, own = (Chances(draws, x.numpy()) for x in (logits, guessed))
    p, q = (np.array([x.of(n) for n in range(9)]) for x in (parent, own))
    found, accepted = Counter[int](), 0
    for _ in range(count):
        guess = Guess(own.draw(), own, 0.0)
        token = accepted_or_drawn(parent, guess)
        found[token] += 1
        accepted += token == guess.token
    drawable = [n for n in range(9) if p[n] > 0]
    assert set(found) <= {*drawable}
    assert p.sum() == pytest.approx(1, abs=1e-7)
    expected = p[drawable] / p[drawable].sum()
    assert chisquare([found[n] for n in drawable], count * expected).pvalue > 1e-3
    rate = float(np.minimum(p, q).sum())
    assert accepted / count == pytest.approx(rate, abs=4 * (0.25 / count) ** 0.5)


@pytest.mark.parametrize("options", SHAPE.values(), ids=SHAPE)
@pytest.mark.parametrize("draft", ["near", "far", "opposite"])
def test_the_distribution_is_the_parents(options: dict[str, Any], draft: str) -> None:
    check_draws(options, draft, 5_000)


@pytest.mark.slow
@pytest.mark.parametrize("draft", ["near", "far"])
def test_the_distribution_of_many_draws(draft: str) -> None:
    check_draws(SHAPE["plain"], draft, 100_000)


@pytest.mark.slow
def test_texts_of_two_tokens_have_the_parents_distribution(tmp_path: Path) -> None:
    """Through the whole loop: 8,000 texts of three tokens from the three most likely."""
    parent, draft = parent_and_draft(tmp_path)
    ids = torch.tensor([5, 17, 80])
    counts = []
    drafter = drafter_of(draft)
    decoder = Decoder(parent, ROOM, continues=True)
    for loop in ("plain", "drafted"):
        found = Counter[Sequence[int]]()
        for seed in range(8_000):
            sampling = Sampling(temperature=1.0, top_k=3, seed=seed + 100_000 * (loop == "plain"))
            text = (
                continued(decoder, ids, 3, sampling=sampling)
                if loop == "plain"
                else speculated(decoder, drafter, ids, 3, sampling=sampling)
            )
            found[tuple(text)] += 1
        counts.append(found)
    assert 0 < drafter.accepted < drafter.proposed
    common = [text for text in counts[0] if counts[0][text] >= 20]
    left = [8_000 - sum(found[text] for text in common) for found in counts]
    rows = ([found[text] for text in common] for found in counts)
    table = torch.tensor([[*row, rest] for row, rest in zip(rows, left, strict=True)]).double()
    table = table[:, table.sum(0) > 0]
    expected = table.sum(0, keepdim=True) / 2
    statistic = float(((table - expected) ** 2 / expected).sum())
    freedom = table.shape[1] - 1
    assert statistic < freedom + 4 * (2 * freedom) ** 0.5


def test_several_texts_at_once(tmp_path: Path) -> None:
    """Each is what it is alone, with proposals of any lengths, in slots that are used again."""
    parent, draft = parent_and_draft(tmp_path)
    drafter, slots = drafter_of(draft, slots=3), SlotDecoder(parent, ROOM, 3)
    for begin in (0, 3):
        prompts = [[5 + n, 17, 80, 3 + begin][: 2 + n % 3] for n in range(begin, begin + 3)]
        expected = [[*continued(Decoder(parent, ROOM), torch.tensor(ids), 25)] for ids in prompts]
        texts, draws = [[*ids] for ids in prompts], [Draws(GREEDY, ids) for ids in prompts]
        for slot, ids in enumerate(prompts):
            slots.rewind(slot)
            logits = slots.read(slot, torch.tensor(ids))[0]
            texts[slot].append(draws[slot].draw(logits))
        while min(len(t) - len(p) for t, p in zip(texts, prompts, strict=True)) < 25:
            drafted = [DraftedText(n, texts[n], draws[n], 4) for n in range(3)]
            guesses = drafter.propose(drafted, 5)
            assert sum(map(len, guesses)) <= 5
            tokens = []
            for n, text in enumerate(texts):
                ids = [text[-1], *(guess.token for guess in guesses[n])]
                tokens += [Token(n, len(text) - 1 + i, x) for i, x in enumerate(ids)]
            rows = slots.step(tokens).split([1 + len(found) for found in guesses])
            for n, text in enumerate(texts):
                new = [*verified(draws[n], rows[n], guesses[n])]
                slots.rewind(n, len(text) - 1 + len(new))
                text += new
        for text, ids, right in zip(texts, prompts, expected, strict=True):
            assert text[len(ids) :][:25] == right
    assert not drafter.pace.parent.least


def test_a_head_over_frequent_tokens(tmp_path: Path) -> None:
    """Only these are proposed, with the logits that the whole head has for them."""
    parent, draft = parent_and_draft(tmp_path)
    ids = torch.tensor(sorted({*range(0, 96, 3), *range(60, 90)}))
    text = torch.tensor([5, 17, 80, 33])
    whole = SlotDecoder(draft, ROOM).read(0, text)
    few = SlotDecoder(draft, ROOM, head=ids).read(0, text)
    assert torch.equal(few, whole[:, ids])
    drafter = drafter_of(draft, ids=ids)
    expected = [*continued(Decoder(parent, ROOM), text, 40)]
    assert [*speculated(Decoder(parent, ROOM), drafter, text, 40, sampling=GREEDY)] == expected
    guess = guessed(Draws(Sampling(temperature=1.0)), few[0], 96, ids)
    assert guess.chances is not None
    chances = [guess.chances.of(token) for token in range(96)]
    assert {token for token, chance in enumerate(chances) if chance} <= set(ids.tolist())
    assert sum(chances) == pytest.approx(1, abs=1e-7)


@pytest.mark.parametrize("values", ["int8", "int4", "float32"])
def test_rows_of_every_kind_of_head(tmp_path: Path, values: str) -> None:
    embeddings = {"embeddings": values, "group_size": 32} if values != "float32" else {}
    folder = packed_model(tmp_path, values="int4", **embeddings)
    model, ids = secateur.load(folder), torch.tensor([0, 7, 8, 41, 95])
    text = torch.tensor([5, 17, 80, 33])
    found = SlotDecoder(model, ROOM, head=ids).read(0, text, every=True)
    assert torch.equal(found, SlotDecoder(model, ROOM).read(0, text, every=True)[:, ids])


def test_seconds_of_calls_are_the_least_of_the_last_ones() -> None:
    """Interrupted calls do not count, numbers that were not called count as smaller ones."""
    times = CallSeconds()
    assert times.seconds(3) == 0
    times.note(2, 3.0)
    assert times.seconds(1) == times.seconds(2) == times.seconds(7) == 3
    for tokens in (1, 3, 5, 8) * 5:
        times.note(tokens, 1.5 + 0.5 * tokens)
    assert [times.seconds(n) for n in (1, 2, 3, 4, 5, 8)] == [2, 3, 3, 3, 4, 5.5]
    times.note(5, 400.0)
    assert times.seconds(6) == 4
    for tokens in (1, 5) * 32:
        times.note(tokens, 10.0 * tokens)
    assert [times.seconds(n) for n in (1, 2, 4, 5, 6)] == [10, 10, 10, 50, 50]


def test_the_pace_follows_costs_and_acceptance() -> None:
    """What the draft is sure of is accepted more; where it never helps it sleeps ever longer."""
    pace = Pace()
    assert not pace.awake()  # what a call takes is not known yet
    pace.parent.note(1, 1.0)
    assert pace.awake()
    guess = Guess(1, None, 0.95)
    assert pace.accepts(0.95) == pytest.approx(0.95)
    for _ in range(200):
        pace.judged(guess, False)
    assert pace.accepts(0.95) < 0.05
    assert pace.accepts(0.15) == pytest.approx(0.15)
    naps = []
    for _ in range(3):
        for _ in range(8):  # each loses half of a token
            pace.round(1, 1.5, 1)
            assert pace.asleep == 0
        pace.round(1, 1.5, 1)
        naps.append(pace.asleep)
        pace.asleep = 0
    assert naps == [128, 512, 2048]
    for _ in range(40):
        pace.round(1, 1.5, 3)
    assert pace.asleep == 0
    assert pace.nap == 128


@pytest.mark.parametrize("right", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("cost", [0.1, 0.9])
def test_a_draft_is_used_where_it_pays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, right: float, cost: float
) -> None:
    """With pretended times, and a draft that is the parent but wrong now and then.

    A call of the parent takes 1 and for each token 0.05 more. Seldom is a text slower than without
    the draft, and then by little.
    """
    parent, _ = parent_and_draft(tmp_path)
    now, random = [0.0], torch.Generator().manual_seed(0)
    drafter = Drafter(SlotDecoder(parent, 400), 96, clock=lambda: now[0])
    decoder = Decoder(parent, 400)
    steps = {"parent": decoder.slots.step, "draft": drafter.decoder.step}

    def step(name: str, tokens: Sequence[Token]) -> torch.Tensor:
        now[0] += 1 + 0.05 * len(tokens) if name == "parent" else cost
        logits = steps[name](tokens)
        wrong = name == "draft" and float(torch.rand(1, generator=random)) >= right
        return logits.flip(1) if wrong else logits

    monkeypatch.setattr(decoder.slots, "step", lambda tokens: step("parent", tokens))
    monkeypatch.setattr(drafter.decoder, "step", lambda tokens: step("draft", tokens))
    found = [*speculated(decoder, drafter, torch.tensor([5, 17, 80]), 300, sampling=GREEDY)]
    assert len(found) == 300
    speedup = 299 * 1.05 / now[0]
    assert speedup > 0.95
    if cost == 0.1:
        # of k tokens: (1 + right + … + right^k) · 1.05 / (k · 0.1 + 1 + 0.05 · (k + 1))
        best = {0.0: 1.0, 0.5: 1.45, 1.0: 4.0}[right]
        assert 0.85 * best < speedup < 1.1 * best
    elif right < 1:
        assert drafter.proposed < 60


def test_what_is_no_draft_is_refused(tmp_path: Path) -> None:
    folder = packed_model(tmp_path / "parent", values="int4")
    parent, tokenizer = SlotDecoder(secateur.load(folder), ROOM), load_tokenizer(folder)
    assert open_drafter(folder, folder, parent, tokenizer).ids is None
    other: Any = load_tokenizer(folder)
    other.add_tokens(["new"])
    with pytest.raises(RecipeError, match="vocabularies"):
        open_drafter(folder, folder, parent, other)
    strange = packed_model(tmp_path / "strange", "gpt2", values="int8")
    with pytest.raises(ArchitectureError, match="gpt2"):
        open_drafter(strange, folder, parent, tokenizer)
    notes = folder / "secateur"
    notes.mkdir(exist_ok=True)
    file = notes / "frequent_tokens.safetensors"
    for ids in ([3, 2], [96_000], [1.0], []):
        save_file({"ids": torch.tensor(ids)}, file)
        with pytest.raises(CheckpointError, match="frequent tokens"):
            frequent_tokens(folder, 96)
    file.write_bytes(b"no such file")
    with pytest.raises(CheckpointError, match="frequent tokens"):
        frequent_tokens(folder, 96)
    save_file({"ids": torch.tensor([1, 5, 80])}, file)
    drafter = open_drafter(folder, folder, parent, tokenizer)
    assert drafter.ids is not None
    assert drafter.ids.tolist() == [1, 5, 80]
