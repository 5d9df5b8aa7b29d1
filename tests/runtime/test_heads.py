"""A draft head in our loop: what torch computes, and the parent's text exactly."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from scipy.stats import chi2_contingency
from torch import nn
from with_kernels import needs_kernels

import secateur
from runtime.packed_models import Eager, packed_model, settled
from secateur.errors import ArchitectureError, RecipeError
from secateur.models.draft_head import DraftHead, head_config, write_head
from secateur.recipes.deploy import Sampling
from secateur.runtime.decode import Decoder, SlotDecoder, Token, continued
from secateur.runtime.heads import HeadDecoder
from secateur.runtime.sampling import Draws
from secateur.runtime.speculative import (
    DraftedText,
    HeadDrafter,
    Pace,
    open_drafter,
    speculated,
)
from secateur.serving.scheduler import PrefixCache, Request, Scheduler, ServingJob
from secateur.steps.draft import proposed_in

pytestmark = [needs_kernels, pytest.mark.usefixtures("settled")]
__all__ = ["settled"]

ROOM = 80
GREEDY = Sampling(temperature=0.0)


def parent_of(folder: Path, values: str = "bfloat16", family: str = "llama", **more: Any) -> Any:
    dtype = torch.float32 if values == "float32" else torch.bfloat16
    group = {"group_size": 32} if values == "int4" else {}
    return secateur.load(
        packed_model(folder, family, values=values, dtype=dtype, head_dim=16, **group, **more)
    )


def head_of(parent: Any, ids: torch.Tensor, seed: int = 0) -> DraftHead:
    torch.manual_seed(seed)
    head = DraftHead(head_config(parent.config), (0, 1, 3), ids)
    for parameter in head.parameters():
        if parameter.ndim == 1:
            nn.init.normal_(parameter, 1.0, 0.2)
        else:
            nn.init.normal_(parameter, 0.0, 2 * parameter.shape[1] ** -0.5)
    return head.eval().requires_grad_(False)


def states_of(parent: Any, text: torch.Tensor, taps: tuple[int, ...]) -> torch.Tensor:
    decoder = SlotDecoder(parent, len(text), taps=taps)
    decoder.read(0, text)
    return decoder.take_states(0)[1]


def taught(parent: Any, ids: torch.Tensor) -> DraftHead:
    """A head that has learned what its parent writes after a few prompts."""
    head, embed = head_of(parent, ids), parent.get_input_embeddings()
    decoder = Decoder(parent, ROOM)
    texts = [[first, *continued(decoder, torch.tensor([first]), 24)] for first in range(3, 96, 8)]
    states = torch.stack([states_of(parent, torch.tensor(x), head.taps) for x in texts])
    tokens, place = torch.tensor(texts), torch.full((96,), -100)
    place[ids] = torch.arange(len(ids))
    embedded = embed(tokens).float().clone()
    head.requires_grad_(True)
    learner = torch.optim.Adam(head.parameters(), lr=3e-3)
    for _ in range(80):
        found = head(states[:, :-3].flatten(2).clone(), embedded[:, 1:-1], 2)
        wanted = [place[tokens[:, 2:-1]], place[tokens[:, 3:]]]
        losses = [
            nn.functional.cross_entropy(x.flatten(0, 1), y.flatten())
            for x, y in zip(found, wanted, strict=True)
        ]
        learner.zero_grad()
        sum(losses).backward()
        learner.step()
    return head.eval().requires_grad_(False)


def drafter_of(
    head: DraftHead, parent: SlotDecoder, values: str = "int8", pace: Pace | None = None
) -> HeadDrafter:
    drafter = HeadDrafter(HeadDecoder(head, parent, values), parent, head.ids)
    drafter.pace = pace or Eager()
    return drafter


EVERY = torch.arange(96)
SOME = torch.arange(1, 96, 2)


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, DraftHead]:
    """A parent, and a head that is often right."""
    parent = parent_of(tmp_path_factory.mktemp("parent"))
    return parent, taught(parent, EVERY)


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_it_computes_what_torch_computes(tmp_path: Path, family: str) -> None:
    """A prompt, a few tokens, and a chain of three; each of two slots."""
    parent = parent_of(tmp_path, "float32", family)
    head, text = head_of(parent, SOME), torch.randint(3, 96, (20,))
    states, embed = states_of(parent, text[:16], head.taps), parent.get_input_embeddings()
    wanted = head(states.flatten(1)[None], embed(text[1:])[None], 4)
    slots = SlotDecoder(parent, 32, slots=2, taps=head.taps)
    decoder = HeadDecoder(head, slots, "float32")
    decoder.give(1, states[:13])
    found = [decoder.read(1, text[1:14], every=True)]
    decoder.give(1, states[13:])
    found += [decoder.step([Token(1, n, int(text[n + 1])) for n in range(13, 16)])]
    near = {"rtol": 1e-4, "atol": 1e-4}
    torch.testing.assert_close(torch.cat(found), wanted[0][0], **near)
    for place in (1, 2, 3):
        row = decoder.step([Token(1, 15 + place, int(text[16 + place]))])
        torch.testing.assert_close(row, wanted[place][0, -1:], **near)
    decoder.rewind(1, 10)
    decoder.give(1, states[10:12])
    decoder.give(0, states[:3])
    tokens = [Token(0, n, int(text[n + 1]), n == 2) for n in range(3)]
    row = decoder.step([*tokens, Token(1, 10, int(text[11]), False), Token(1, 11, int(text[12]))])
    torch.testing.assert_close(row, wanted[0][0, [2, 11]], **near)


@pytest.mark.parametrize("values", ["bfloat16", "int8", "int4"])
def test_matrices_of_every_kind(tmp_path: Path, values: str) -> None:
    parent = parent_of(tmp_path, "float32")
    head, text = head_of(parent, SOME), torch.randint(3, 96, (20,))
    states, embed = states_of(parent, text, head.taps), parent.get_input_embeddings()
    wanted = head(states[:-1].flatten(1)[None], embed(text[1:])[None])[0][0]
    decoder = HeadDecoder(head, SlotDecoder(parent, 32, taps=head.taps), values)
    decoder.give(0, states[:-1])
    found = decoder.read(0, text[1:], every=True)
    most = {"bfloat16": 0.03, "int8": 0.05, "int4": 0.3}[values]
    assert 1e-4 < float((found - wanted).norm() / wanted.norm()) < most


@pytest.mark.parametrize("values", ["bfloat16", "int8", "int4"])
@pytest.mark.parametrize("options", [{}, {"repetition_penalty": 1.3}], ids=str)
def test_greedy_text_is_the_parents(
    tmp_path: Path, pair: tuple[Any, DraftHead], values: str, options: dict[str, float]
) -> None:
    """With a random head, and with one that is often right."""
    parent = pair[0] if values == "bfloat16" else parent_of(tmp_path, values)
    sampling = Sampling(temperature=0.0, **options)
    rates = []
    for head in (head_of(parent, SOME), pair[1]):
        decoder = Decoder(parent, ROOM)
        drafter = drafter_of(head, decoder.slots)
        for first in range(3):
            ids = torch.arange(3 + first, 40, 7)
            expected = [*continued(Decoder(parent, ROOM), ids, 40, sampling=sampling)]
            assert [*speculated(decoder, drafter, ids, 40, sampling=sampling)] == expected
        rates.append(drafter.accepted / drafter.proposed)
    assert rates[0] < rates[1]
    assert values != "bfloat16" or options or rates[1] > 0.3


def test_a_conversation_goes_on_where_it_ended(pair: tuple[Any, DraftHead]) -> None:
    """Also after a text that was left in the middle of a proposal, and after a sleep."""
    parent, head = pair
    decoder = Decoder(parent, ROOM, continues=True)
    drafter, text = drafter_of(head, decoder.slots), [5, 17, 80]
    for number in (9, 4, 11):
        found = speculated(decoder, drafter, torch.tensor(text), 30, sampling=GREEDY)
        text += [next(found) for _ in range(number)]
        found.close()
        text.append(number)
        if number == 4:
            # nothing is proposed for a while
            text += [*continued(decoder, torch.tensor(text), 3)]
    expected = [*continued(Decoder(parent, ROOM), torch.tensor(text), 10)]
    found = [*speculated(decoder, drafter, torch.tensor(text), 10, sampling=GREEDY)]
    assert found == expected
    # what the head has read is what it reads of the whole text at once
    ids = [*text, *found]
    [[[one]], [[other]]] = (
        each.propose([DraftedText(0, ids, Draws(GREEDY, ids), 1)], 1)
        for each in (drafter, fresh(parent, head, ids))
    )
    assert one.token == other.token
    assert one.sure == pytest.approx(other.sure, abs=0.02)
    # states that were taken and never read, as where a call was interrupted
    decoder.slots.step([Token(0, len(ids) - 1, ids[-1])])
    decoder.slots.take_states(0)
    decoder.slots.step([Token(0, len(ids), 7)])
    ids += [7, 9]
    [[guess]] = drafter.propose([DraftedText(0, ids, Draws(GREEDY, ids), 1)], 1)
    assert drafter.begins == [len(ids) - 2]
    assert 0 < guess.sure <= 1


def fresh(parent: Any, head: DraftHead, ids: list[int]) -> HeadDrafter:
    """A drafter beside a parent that has read a text but its last token."""
    slots = SlotDecoder(parent, ROOM)
    drafter = drafter_of(head, slots)
    slots.read(0, torch.tensor(ids[:-1]))
    return drafter


@pytest.mark.slow
def test_texts_have_the_parents_distribution(pair: tuple[Any, DraftHead]) -> None:
    """Through the whole loop: texts of three tokens from the three most likely, by chi-squared."""
    parent, head = pair
    head = DraftHead(head.config, head.taps, SOME)  # proposes half of the tokens
    head.load_state_dict({**pair[1].state_dict(), "lm_head.weight": pair[1].lm_head.weight[SOME]})
    decoder, count = Decoder(parent, ROOM, continues=True), 4_000
    drafter, ids = drafter_of(head, decoder.slots), torch.tensor([5, 17, 80])
    found = [Counter[Sequence[int]](), Counter[Sequence[int]]()]
    for seed in range(count):
        one, other = (Sampling(temperature=1.0, top_k=3, seed=seed + n) for n in (0, 10**6))
        found[0][tuple(continued(decoder, ids, 3, sampling=one))] += 1
        found[1][tuple(speculated(decoder, drafter, ids, 3, sampling=other))] += 1
    assert 0 < drafter.accepted < drafter.proposed
    common = [text for text, times in found[0].items() if times >= 15]
    rows = [[own[text] for text in common] for own in found]
    table = torch.tensor([[*row, count - sum(row)] for row in rows])
    assert chi2_contingency(table[:, table.sum(0) > 0]).pvalue > 1e-3


@pytest.mark.parametrize("prefix_bytes", [0, 1 << 22])
def test_requests_that_are_served_together(pair: tuple[Any, DraftHead], prefix_bytes: int) -> None:
    """Greedy texts are those of one request alone, also where the beginning was copied."""
    parent, head = pair
    prompts = [[*range(3, 60), 7 + n] for n in range(3)]
    expected = [[*continued(Decoder(parent, 200), torch.tensor(ids), 30)] for ids in prompts]
    engine = SlotDecoder(parent, 200, 2)
    drafter = drafter_of(head, engine)
    scheduler = Scheduler(engine, drafter=drafter, prefixes=PrefixCache(prefix_bytes))
    texts, ends = [list[int]() for _ in prompts], list[str]()
    for ids, text in zip(prompts, texts, strict=True):
        request = Request(ids, 30, GREEDY)
        scheduler.submit(
            ServingJob(request, lambda token, _, text=text: not text.append(token), ends.append)
        )
    while len(ends) < len(prompts):
        scheduler.step()
    assert texts == expected
    assert 20 < drafter.accepted <= drafter.proposed
    assert (scheduler.counts["prompt_tokens_cached"] > 0) == (prefix_bytes > 0)


def test_a_chain_that_is_timed_leaves_no_trace(pair: tuple[Any, DraftHead]) -> None:
    parent, head = pair
    slots, prompt = SlotDecoder(parent, ROOM), torch.tensor([5, 17, 80])
    decoder = HeadDecoder(head, slots)
    slots.read(0, prompt)
    states = slots.take_states(0)[1]
    rows = []
    for timed in (False, True):
        decoder.rewind(0)
        decoder.give(0, states[:2])
        decoder.read(0, torch.tensor([17, 80]))
        assert not timed or 0 < proposed_in(decoder, prompt, states)() < 1
        decoder.give(0, states[2:])
        rows.append(decoder.step([Token(0, 2, 9)]))
    assert torch.equal(*rows)


def test_it_is_used_where_it_pays(pair: tuple[Any, DraftHead]) -> None:
    """With the usual pace and pretended seconds: a head that costs more than it brings sleeps."""
    parent, head = pair
    for cost, pays in ((0.02, True), (2.0, False)):
        now, decoder = [0.0], Decoder(parent, 400)
        drafter = HeadDrafter(
            HeadDecoder(head, decoder.slots), decoder.slots, head.ids, lambda now=now: now[0]
        )
        for slots, seconds in ((decoder.slots, 1.0), (drafter.decoder, cost)):
            step = slots.step
            slots.step = lambda tokens, step=step, seconds=seconds, now=now: (
                now.__setitem__(0, now[0] + seconds) or step(tokens)
            )
        ids = torch.tensor([5, 17, 80])
        assert len([*speculated(decoder, drafter, ids, 300, sampling=GREEDY)]) == 300
        assert (now[0] < 250) == pays
        assert now[0] < 320


def test_heads_of_other_parents_are_refused(tmp_path: Path, pair: tuple[Any, DraftHead]) -> None:
    parent, head = pair
    folder = tmp_path / "head"
    folder.mkdir()
    write_head(folder, head, "parent", "LlamaForCausalLM", 5)
    slots = SlotDecoder(parent, ROOM)
    drafter = open_drafter(folder, folder, slots, None)
    assert isinstance(drafter, HeadDrafter)
    assert drafter.decoder.vocabulary == 96
    with pytest.raises(ArchitectureError, match="draft head"):
        secateur.load(folder)
    for name, value in (("hidden_size", 64), ("num_hidden_layers", 2), ("vocab_size", 128)):
        other = parent_of(tmp_path / name, **{name: value})
        with pytest.raises(RecipeError, match="another model"):
            open_drafter(folder, folder, SlotDecoder(other, ROOM), None)
