"""Whatever the order of arrival, every request gets what it would get alone."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import secateur
from runtime.packed_models import packed_model, settled
from secateur.recipes.deploy import Sampling
from secateur.runtime.decode import Decoder, SlotDecoder, Token, continued
from secateur.runtime.kernels import library as lib
from secateur.runtime.sampling import Draws
from secateur.serving.scheduler import (
    BLOCK_TOKENS,
    PrefixCache,
    QueueFullError,
    Request,
    Scheduler,
    ServingJob,
    TransformersEngine,
)

__all__ = ["settled"]

VOCABULARY = 23


def next_logits(text: Sequence[int]) -> Tensor:
    """A language of which every token depends on all tokens before it."""
    seed = 17
    for token in text:
        seed = (seed * 31 + token + 1) % 1_000_003
    return torch.randn(VOCABULARY, generator=torch.Generator().manual_seed(seed))


@dataclass
class Pretended:
    """An engine that remembers tokens in place of keys and values, and checks how it is used."""

    slots: int = 3
    capacity: int = 200
    together: int = 8
    texts: list[list[int]] = field(default_factory=list)
    calls: list[list[Token]] = field(default_factory=list)
    pieces: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.texts = [[] for _ in range(self.slots)]

    @property
    def lengths(self) -> list[int]:
        return [len(text) for text in self.texts]

    def read(self, slot: int, ids: Tensor, *, every: bool = False) -> Tensor:
        self.pieces.append(len(ids))
        found = []
        for token in ids.tolist():
            self.texts[slot].append(token)
            found.append(next_logits(self.texts[slot]))
        assert len(self.texts[slot]) <= self.capacity
        return torch.stack(found if every else found[-1:])

    def step(self, tokens: Sequence[Token]) -> Tensor:
        assert 1 <= len(tokens) <= self.together
        self.calls.append([*tokens])
        found = []
        for token in tokens:
            assert token.position == len(self.texts[token.slot])
            self.texts[token.slot].append(token.id)
            assert len(self.texts[token.slot]) <= self.capacity
            if token.answered:
                found.append(next_logits(self.texts[token.slot]))
        return torch.stack(found) if found else torch.empty(0, VOCABULARY)

    def rewind(self, slot: int, length: int = 0) -> None:
        del self.texts[slot][length:]

    def copy_out(self, slot: int, begin: int, end: int) -> Tensor:
        assert end <= len(self.texts[slot])
        return torch.tensor(self.texts[slot][begin:end])

    def copy_in(self, slot: int, known: Tensor) -> None:
        self.texts[slot] += known.tolist()


@dataclass
class Client:
    """Receives the tokens of one request."""

    request: Request
    stop_after: int | None = None
    scored: bool = False
    tokens: list[int] = field(default_factory=list)
    reasons: list[str] = field(default_factory=list)
    logits: list[Tensor] = field(default_factory=list)

    def __post_init__(self) -> None:
        score = self.logits.extend if self.scored else None
        self.job = ServingJob(self.request, self.take, self.reasons.append, score)

    def take(self, token: int, logits: Tensor) -> bool:
        assert not self.reasons
        self.tokens.append(token)
        return len(self.tokens) != self.stop_after


def plain_loop(request: Request) -> list[int]:
    """The oracle: the tokens of a request that is alone."""
    draws, text, found = Draws(request.sampling, request.ids), [*request.ids], list[int]()
    while len(found) < request.max_new_tokens:
        token = draws.draw(next_logits(text))
        if token in request.ends:
            break
        found.append(token)
        text.append(token)
    return found


def run(scheduler: Scheduler, limit: int = 5000) -> None:
    for _ in range(limit):
        if scheduler.idle:
            return
        scheduler.step()
    raise AssertionError("the scheduler does not come to an end")


PROMPTS = st.one_of(
    st.lists(st.integers(0, VOCABULARY - 1), min_size=1, max_size=70),
    st.integers(1, 100).map(lambda n: [*itertools.islice(itertools.cycle(range(9)), n)]),
)
REQUESTS = st.builds(
    lambda ids, new, temperature, seed, ends: Request(
        ids, new, Sampling(temperature=temperature, seed=seed), frozenset(ends)
    ),
    PROMPTS,
    st.integers(0, 30),
    st.sampled_from([0.0, 1.0]),
    st.integers(0, 3),
    st.sets(st.integers(0, VOCABULARY - 1), max_size=2),
)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_every_request_gets_what_it_would_get_alone(data: st.DataObject) -> None:
    """Random arrivals, cancels, ends, sizes, and a prefix cache that is too small or not."""
    engine = Pretended(data.draw(st.integers(1, 8)), together=8)
    cache = PrefixCache(data.draw(st.sampled_from([0, 3, 1000])) * BLOCK_TOKENS * 8)
    piece = data.draw(st.integers(9, 40))
    scheduler = Scheduler(engine, queue_limit=50, prefixes=cache, piece_tokens=piece)
    clients: list[Client] = []
    for _ in range(data.draw(st.integers(1, 12))):
        request = data.draw(REQUESTS)
        client = Client(
            request, data.draw(st.none() | st.integers(1, 10)), data.draw(st.booleans())
        )
        clients.append(client)
        scheduler.submit(client.job)
        for _ in range(data.draw(st.integers(0, 6))):
            scheduler.step()
        if data.draw(st.integers(0, 5)) == 0:
            clients[data.draw(st.integers(0, len(clients) - 1))].job.cancelled = True
    run(scheduler)
    for client in clients:
        expected = plain_loop(client.request)[: client.stop_after]
        (reason,) = client.reasons
        if reason == "cancelled":
            assert client.job.cancelled
            assert client.tokens == expected[: len(client.tokens)]
        else:
            assert client.tokens == expected
            full = len(expected) == client.request.max_new_tokens != client.stop_after
            assert reason == ("length" if full else "stop")
            assert client.job.last is None or client.job.last[0] in client.request.ends
            ids = client.request.ids if client.scored else []
            assert len(client.logits) == len(ids)
            for number, logits in enumerate(client.logits, start=1):
                assert torch.equal(logits, next_logits(ids[:number]))
    assert sorted(scheduler.free) == [*range(engine.slots)]
    assert scheduler.counts.new_tokens == sum(len(c.tokens) for c in clients)
    assert sum(scheduler.counts.ended.values()) == len(clients)
    assert max(engine.pieces, default=0) <= piece
    assert cache.bytes <= cache.limit_bytes


def request_of(ids: Sequence[int], new: int = 5, **options: Any) -> Request:
    return Request(ids, new, Sampling(), **options)


def test_running_requests_get_a_token_in_every_step_while_a_long_prompt_is_read() -> None:
    engine = Pretended(slots=2)
    scheduler = Scheduler(engine, piece_tokens=16)
    short, long = Client(request_of([1, 2], 40)), Client(request_of([5] * 150))
    scheduler.submit(short.job)
    scheduler.step()
    scheduler.submit(long.job)
    while not long.tokens:
        before = len(short.tokens)
        scheduler.step()
        assert len(short.tokens) == before + 1
    assert engine.pieces == [16] * 9  # 144; the last six went along with the other's tokens
    assert len(engine.calls[-1]) == 7


def test_short_prompts_need_not_wait_for_a_long_one() -> None:
    engine = Pretended(slots=2)
    scheduler = Scheduler(engine, piece_tokens=16)
    long, short = Client(request_of([5] * 150)), Client(request_of([7] * 20))
    scheduler.submit(long.job)
    scheduler.submit(short.job)
    for _ in range(3):
        scheduler.step()
    assert short.tokens
    assert not long.tokens


def test_a_known_beginning_is_not_read_again() -> None:
    engine = Pretended(slots=1)
    scheduler = Scheduler(engine, prefixes=PrefixCache(1 << 20), piece_tokens=512)
    system = [3] * (2 * BLOCK_TOKENS + 5)
    first, second = Client(request_of([*system, 1, 2])), Client(request_of([*system, 4, 4]))
    for client in (first, second):
        scheduler.submit(client.job)
        run(scheduler)
        assert client.tokens == plain_loop(client.request)
    assert (first.job.cached, second.job.cached) == (0, 2 * BLOCK_TOKENS)
    assert scheduler.counts.cached_tokens == 2 * BLOCK_TOKENS
    again = Client(request_of([*second.request.ids, *second.tokens, *[8] * BLOCK_TOKENS]))
    scheduler.submit(again.job)
    run(scheduler)
    assert again.job.cached == 2 * BLOCK_TOKENS  # a block of the answer was not full
    assert again.tokens == plain_loop(again.request)


def test_the_queue_is_bounded_and_in_order() -> None:
    engine = Pretended(slots=1)
    scheduler = Scheduler(engine, queue_limit=3)
    clients = [Client(request_of([n])) for n in range(4)]
    scheduler.submit(clients[0].job)
    scheduler.step()  # runs, so it does not wait
    for client in clients[1:]:
        scheduler.submit(client.job)
    with pytest.raises(QueueFullError, match="3 requests are waiting already"):
        scheduler.submit(Client(request_of([9])).job)
    ended: list[int] = []
    while not scheduler.idle:
        scheduler.step()
        ended += [n for n, c in enumerate(clients) if c.reasons and n not in ended]
    assert ended == [0, 1, 2, 3]


def test_jobs_of_one_request_are_queued_together_or_not_at_all() -> None:
    scheduler = Scheduler(Pretended(slots=2), queue_limit=1)
    many = [Client(request_of([n])) for n in range(9)]
    scheduler.submit(*(client.job for client in many))
    with pytest.raises(QueueFullError, match="7 requests are waiting already"):
        scheduler.submit(Client(request_of([1])).job, Client(request_of([2])).job)
    assert len(scheduler.queue) == 9
    run(scheduler)
    assert all(client.tokens == plain_loop(client.request) for client in many)


def test_without_a_queue_only_free_slots_are_given() -> None:
    scheduler = Scheduler(Pretended(slots=2), queue_limit=0)
    for number in range(2):
        scheduler.submit(Client(request_of([number])).job)
    with pytest.raises(QueueFullError, match="0 requests are waiting already"):
        scheduler.submit(Client(request_of([7])).job)


def test_a_scored_prompt_is_read_whole() -> None:
    engine = Pretended(slots=1)
    scheduler = Scheduler(engine, prefixes=PrefixCache(1 << 20), piece_tokens=16)
    ids = [3] * (BLOCK_TOKENS + 4)
    for scored, pieces in ((False, [16, 16]), (False, []), (True, [16, 16, 4])):
        engine.pieces.clear()
        client = Client(request_of(ids, 0), scored=scored)
        scheduler.submit(client.job)
        run(scheduler)
        assert engine.pieces == pieces
        assert client.reasons == ["length"]
        assert client.tokens == []
    assert len(client.logits) == len(ids)


def test_time_runs_out_in_the_queue_and_in_a_slot() -> None:
    now = 0.0
    engine = Pretended(slots=1)
    scheduler = Scheduler(engine, clock=lambda: now)
    running = Client(request_of([1], 50, deadline=10.0))
    waiting = Client(request_of([2], 50, deadline=5.0))
    last = Client(request_of([3], 2, deadline=100.0))
    for client in (running, waiting, last):
        scheduler.submit(client.job)
    scheduler.step()
    now = 6.0
    scheduler.step()
    assert waiting.reasons == ["timeout"]
    assert running.reasons == []
    now = 10.0
    scheduler.step()
    assert running.reasons == ["timeout"]
    assert running.tokens == plain_loop(running.request)[: len(running.tokens)]
    run(scheduler)
    assert last.reasons == ["length"]


def test_closing_refuses_what_waits_and_lets_run_what_runs() -> None:
    scheduler = Scheduler(Pretended(slots=1))
    running, waiting = Client(request_of([1])), Client(request_of([2]))
    scheduler.submit(running.job)
    scheduler.step()
    scheduler.submit(waiting.job)
    scheduler.close()
    with pytest.raises(QueueFullError, match="the server is stopping"):
        scheduler.submit(Client(request_of([3])).job)
    run(scheduler)
    assert running.reasons == ["length"]
    assert running.tokens == plain_loop(running.request)
    assert waiting.reasons == ["refused"]


def test_an_error_of_the_engine_ends_what_runs_and_no_more() -> None:
    engine = Pretended(slots=2)
    scheduler = Scheduler(engine)
    broken = [Client(request_of([n], 9)) for n in range(3)]
    for client in broken:
        scheduler.submit(client.job)
    scheduler.step()
    scheduler.fail()
    assert [client.reasons for client in broken] == [["error"]] * 3
    after = Client(request_of([4, 5]))
    scheduler.submit(after.job)
    run(scheduler)
    assert after.tokens == plain_loop(after.request)


def real_engine(model: Any, kind: str, slots: int) -> Any:
    return (
        TransformersEngine(model, 200) if kind == "transformers" else SlotDecoder(model, 200, slots)
    )


PIECES: dict[str, Callable[[int], int]] = {"ours": lambda _: 24, "transformers": lambda c: c}


@pytest.mark.usefixtures("settled")
@pytest.mark.parametrize("kind", ["ours", "transformers"])
def test_greedy_tokens_are_those_of_generate(tmp_path: Path, kind: str) -> None:
    """With a real model: nine sequences, four slots, a prefix cache, three orders of arrival."""
    if kind == "ours" and lib.kernel_info().tier == "none":
        pytest.skip(f"no kernels here: {lib.kernel_info().reason}")
    folder = packed_model(tmp_path, head_dim=16, max_position_embeddings=256)
    model = secateur.load(folder, dtype=torch.float32)
    random = torch.Generator().manual_seed(3)
    shared = torch.randint(3, 96, (40,), generator=random).tolist()
    prompts = []
    for number, length in enumerate((1, 7, 9, 30, 70, 2, 8, 33, 5)):
        own = torch.randint(3, 96, (length,), generator=random).tolist()
        prompts.append(shared + own if number % 2 else own)
    expected = []
    for ids in prompts:
        out = model.generate(
            torch.tensor([ids]), max_new_tokens=20, do_sample=False, eos_token_id=None,
            pad_token_id=0,
        )  # fmt: skip
        expected.append(out[0, len(ids) :].tolist())
    for order in (1, 2, 4) if kind == "ours" else (2,):
        engine = real_engine(model, kind, 4)
        cache = PrefixCache(1 << 22 if kind == "ours" else 0)
        piece = PIECES[kind](engine.capacity)
        scheduler = Scheduler(engine, prefixes=cache, piece_tokens=piece)
        clients = [Client(request_of(ids, 20)) for ids in prompts]
        for number in range(len(clients)):
            scheduler.submit(clients[number * order % 9].job)
            for _ in range(order - 1):
                scheduler.step()
        run(scheduler)
        assert [client.tokens for client in clients] == expected
        if kind == "ours":
            assert scheduler.counts.cached_tokens >= 2 * BLOCK_TOKENS
            assert scheduler.counts.calls < 9 * 20 / 2  # several at once
    if kind == "ours":
        alone = [[*continued(Decoder(model, 200), torch.tensor(ids), 20)] for ids in prompts[:3]]
        assert alone == expected[:3]
