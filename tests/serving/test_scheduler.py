"""Whatever the order of arrival, every request gets what it would get alone."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chi2
from torch import Tensor
from with_kernels import needs_kernels

import secateur
from runtime.packed_models import packed_model, settled
from secateur.recipes.deploy import Sampling
from secateur.runtime import decode as caches
from secateur.runtime.decode import SlotDecoder, Token
from secateur.runtime.sampling import Draws
from secateur.runtime.speculative import Drafter
from secateur.serving.scheduler import (
    BLOCK_TOKENS,
    LEAST_PIECE,
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
    """An engine that remembers tokens in place of keys and values, and checks how it is used.

    Every so many texts, by `wrong`, it is wrong about the next token, as a draft is.

    Its clock is `now`. A call takes `call` seconds. A piece takes `fixed`, for each token `each`,
    and for each token and position `deeper`.
    """

    slots: int = 3
    capacity: int = 200
    together: int = 8
    call: float = 0.0
    fixed: float = 0.0
    each: float = 0.0
    deeper: float = 0.0
    copy: float = 0.0
    wrong: int = 0
    now: float = 0.0
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
        middle = len(self.texts[slot]) + len(ids) / 2
        self.now += self.fixed + len(ids) * (self.each + self.deeper * middle)
        found = []
        for token in ids.tolist():
            self.texts[slot].append(token)
            found.append(self.logits(slot))
        assert len(self.texts[slot]) <= self.capacity
        return torch.stack(found if every else found[-1:])

    def step(self, tokens: Sequence[Token]) -> Tensor:
        assert 1 <= len(tokens) <= self.together
        self.calls.append([*tokens])
        self.now += self.call
        found = []
        for token in tokens:
            assert token.position == len(self.texts[token.slot])
            self.texts[token.slot].append(token.id)
            assert len(self.texts[token.slot]) <= self.capacity
            if token.answered:
                found.append(self.logits(token.slot))
        return torch.stack(found) if found else torch.empty(0, VOCABULARY)

    def logits(self, slot: int) -> Tensor:
        text = self.texts[slot]
        return next_logits([*text, 0] if self.wrong and sum(text) % self.wrong == 0 else text)

    def kept(self, slot: int, length: int) -> int:
        return length

    def rewind(self, slot: int, length: int = 0) -> None:
        assert length <= len(self.texts[slot])
        del self.texts[slot][length:]

    def copy_out(self, slot: int, begin: int, end: int) -> Tensor:
        assert end <= len(self.texts[slot])
        return torch.tensor(self.texts[slot][begin:end])

    def copy_in(self, slot: int, known: Tensor) -> None:
        self.now += self.copy
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


def eager(slots: int, wrong: int) -> Drafter:
    """A draft that proposes as much as it may."""
    decoder: Any = Pretended(slots, wrong=wrong)
    drafter = Drafter(decoder, VOCABULARY)
    pace: Any = drafter.pace
    pace.awake, pace.value = (lambda: True), (lambda texts: float("inf"))
    return drafter


@settings(max_examples=80, deadline=None)
@given(st.data())
def test_every_request_gets_what_it_would_get_alone(data: st.DataObject) -> None:
    """Random arrivals, cancels, ends, sizes, and a prefix cache that is too small or not."""
    engine = Pretended(data.draw(st.integers(1, 8)), together=8)
    cache = PrefixCache(data.draw(st.sampled_from([0, 3, 1000])) * BLOCK_TOKENS * 8)
    piece = data.draw(st.integers(9, 40))
    drafter = (
        eager(engine.slots, data.draw(st.integers(1, 9))) if data.draw(st.booleans()) else None
    )
    scheduler = Scheduler(engine, queue_limit=50, prefixes=cache, most_piece=piece, drafter=drafter)
    clients: list[Client] = []
    for _ in range(data.draw(st.integers(1, 12))):
        request = data.draw(REQUESTS)
        if drafter is not None:  # other texts have the same distribution, and are not the same
            request = replace(request, sampling=Sampling())
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
    assert scheduler.counts["draft_tokens_accepted"] <= scheduler.counts["draft_tokens"]
    assert scheduler.counts["new_tokens"] == sum(len(c.tokens) for c in clients)
    assert sum(scheduler.ended.values()) == len(clients)
    assert max(engine.pieces, default=0) <= piece
    assert cache.bytes <= cache.limit_bytes


def request_of(ids: Sequence[int], new: int = 5, **options: Any) -> Request:
    return Request(ids, new, Sampling(), **options)


def submitted(scheduler: Scheduler, *requests: Request) -> list[Client]:
    """Clients of requests that come one after the other."""
    clients = [Client(request) for request in requests]
    for client in clients:
        scheduler.submit(client.job)
    return clients


def served(scheduler: Scheduler, *requests: Request) -> list[Client]:
    """Clients of requests that come together, when they have got what they would get alone."""
    clients = [Client(request) for request in requests]
    scheduler.submit(*(client.job for client in clients))
    run(scheduler)
    assert [client.tokens for client in clients] == [plain_loop(one) for one in requests]
    return clients


def test_a_draft_saves_calls() -> None:
    """A draft that is always right: eight tokens of one text, or two of each of four, in a call."""
    for texts, calls in ((1, 5), (4, 20)):
        scheduler = Scheduler(Pretended(4), drafter=eager(4, 0))
        served(scheduler, *(request_of([n] * 20, 41) for n in range(texts)))
        assert scheduler.counts["decode_calls"] == calls
        assert scheduler.counts["draft_tokens_accepted"] == scheduler.counts["draft_tokens"] > 0


def test_running_requests_get_a_token_in_every_step_while_a_long_prompt_is_read() -> None:
    engine = Pretended(slots=2)
    scheduler = Scheduler(engine, most_piece=16)
    short, long = Client(request_of([1, 2], 40)), Client(request_of([5] * 150))
    scheduler.submit(short.job)
    scheduler.step()
    scheduler.submit(long.job)
    while not long.tokens:
        before = len(short.tokens)
        scheduler.step()
        assert len(short.tokens) == before + 1
    assert engine.pieces == [15] * 10


COSTS = st.fixed_dictionaries(
    {
        "call": st.floats(0, 0.02),
        "fixed": st.floats(0, 0.02),
        "each": st.floats(1e-5, 1e-3),
        "deeper": st.floats(0, 1e-6),
    }
)


@settings(max_examples=40, deadline=None)
@given(COSTS, st.lists(st.integers(20, 1500), min_size=1, max_size=6))
def test_no_gap_is_longer_than_wanted(costs: dict[str, float], prompts: list[int]) -> None:
    """Prompts come in while a text is written, one after the other and together."""
    engine = Pretended(slots=5, capacity=4000, **costs)
    scheduler = Scheduler(engine, gap_seconds=0.1, clock=lambda: engine.now)
    times: list[float] = []
    writing = Client(request_of([1, 2], 2000))
    writing.job.take = lambda token, logits: times.append(engine.now) or True  # type: ignore[func-returns-value]
    scheduler.submit(writing.job)
    for number, size in enumerate(prompts):
        scheduler.submit(Client(request_of([number] * size, 3)).job)
        for _ in range(number % 3):
            scheduler.step()
    while len(scheduler.running) > 1 or scheduler.queue:
        scheduler.step()
    gaps = [after - before for before, after in itertools.pairwise(times)]
    assert max(gaps) <= 0.1


def test_pieces_use_the_time_there_is() -> None:
    engine = Pretended(slots=3, capacity=4000, call=0.01, fixed=0.02, each=0.001)
    scheduler = Scheduler(engine, gap_seconds=0.1, clock=lambda: engine.now)
    submitted(scheduler, request_of([1], 500), *(request_of([n] * 1000) for n in range(2)))
    while len(scheduler.running) != 1 or scheduler.queue:
        scheduler.step()
    assert engine.pieces[:2] == [16, 32]  # no more than twice what was measured
    assert 55 <= min(engine.pieces[6:]) <= max(engine.pieces) <= 61  # 0.9 · (0.1 - 0.01) - 0.02


def test_nobody_is_delayed_by_large_pieces() -> None:
    engine = Pretended(slots=2, capacity=4000, call=0.01, each=0.001)
    scheduler = Scheduler(engine, clock=lambda: engine.now)
    for sizes, pieces in (([500], [500]), ([1200], [400] * 3), ([600, 20], [300, 20, 300])):
        engine.pieces.clear()
        served(scheduler, *(request_of([size % 7] * size, 1) for size in sizes))
        assert engine.pieces == pieces


def test_a_machine_that_is_too_slow_goes_on_in_the_smallest_pieces() -> None:
    engine = Pretended(slots=2, capacity=4000, call=0.2, fixed=0.3, each=0.01)
    scheduler = Scheduler(engine, gap_seconds=0.1, clock=lambda: engine.now)
    served(scheduler, request_of([1], 50), request_of([4] * 320, 5))
    assert engine.pieces == [LEAST_PIECE] * 20


@pytest.mark.parametrize("slots", [8, 16])
def test_sixteen_clients_take_turns(slots: int) -> None:
    engine = Pretended(slots=slots)
    scheduler = Scheduler(engine, most_piece=20)
    requests = (request_of([n] * (3 + 8 * (n % 4)), 40) for n in range(16))
    clients = submitted(scheduler, *requests)
    began: list[int] = []
    waited = dict.fromkeys(range(16), 0)
    while not scheduler.idle:
        before = [len(client.tokens) for client in clients]
        scheduler.step()
        for number, client in enumerate(clients):
            still = bool(client.tokens) and before[number] == len(client.tokens)
            waited[number] = waited[number] + 1 if still and not client.reasons else 0
            if client.tokens and number not in began:
                began.append(number)
        assert max(waited.values()) <= (slots > 8) * 2  # sixteen tokens, with a short prompt: three
    assert all(client.tokens == plain_loop(client.request) for client in clients)
    assert {*began[:8]} == {*range(8)} or slots == 16
    full = [call for call in engine.calls if len(call) == 8]
    assert len(full) >= len(engine.calls) / 2  # no place stays empty while somebody waits


def test_each_of_many_running_requests_gets_its_token_between_two_pieces() -> None:
    engine = Pretended(slots=20, capacity=1000)
    scheduler = Scheduler(engine, most_piece=16)
    clients = [Client(request_of([n], 100)) for n in range(18)]
    scheduler.submit(*(client.job for client in clients))
    for _ in range(10):
        scheduler.step()
    long, short = Client(request_of([5] * 900)), Client(request_of([6] * 5))
    scheduler.submit(long.job)
    scheduler.step()
    for number in range(20):
        before = [len(client.tokens) for client in clients]
        pieces = len(engine.pieces)
        while len(engine.pieces) == pieces:
            scheduler.step()
        after = [len(client.tokens) for client in clients]
        assert all(b > a for a, b in zip(before, after, strict=True))
        if number == 5:
            scheduler.submit(short.job)
        assert short.tokens or number < 9
    run(scheduler)
    assert all(client.tokens == plain_loop(client.request) for client in (*clients, long, short))


def test_a_prompt_that_is_cancelled_between_its_pieces() -> None:
    engine = Pretended(slots=2)
    scheduler = Scheduler(engine, prefixes=PrefixCache(1 << 20), most_piece=40)
    other, gone = Client(request_of([1], 30)), Client(request_of([5] * 150))
    scheduler.submit(other.job, gone.job)
    scheduler.step()
    scheduler.step()
    gone.job.cancelled = True
    run(scheduler)
    assert gone.reasons == ["cancelled"]
    assert sum(engine.pieces) < 100
    assert other.tokens == plain_loop(other.request)
    [again] = served(scheduler, gone.request)
    assert again.job.cached == sum(engine.pieces[:2]) // BLOCK_TOKENS * BLOCK_TOKENS > 0


@pytest.mark.parametrize(("size", "new"), [(200, 0), (199, 1), (8, 0), (7, 1), (192, 8)])
def test_a_prompt_that_fills_the_context(size: int, new: int) -> None:
    engine = Pretended(slots=2, capacity=max(size, 8) + max(new, 1) - 1)
    scheduler = Scheduler(engine, prefixes=PrefixCache(1 << 20), most_piece=50)
    for _ in range(2):
        _, full = served(scheduler, request_of([3], 8), request_of([4] * size, new))
        assert full.reasons == ["length"]


def test_equal_prompts_that_come_together_are_read_once() -> None:
    engine = Pretended(slots=4, capacity=1000)
    scheduler = Scheduler(engine, prefixes=PrefixCache(1 << 20), most_piece=100)
    clients = served(scheduler, *(request_of([5] * 640 + [n]) for n in range(4)))
    assert sum(engine.pieces) < 1000
    cached = sum(client.job.cached for client in clients)
    assert scheduler.counts["prompt_tokens_cached"] == cached > 1500


def test_a_long_known_beginning_is_copied_in_pieces_too() -> None:
    engine, known = Pretended(2, 4000, call=0.01, each=0.0001, copy=0.02), PrefixCache(1 << 20)
    scheduler = Scheduler(engine, prefixes=known, gap_seconds=0.1, clock=lambda: engine.now)
    long = [7] * (20 * BLOCK_TOKENS + 5)
    served(scheduler, request_of(long, 1))
    writing, again = Client(request_of([1], 50)), Client(request_of(long))
    scheduler.submit(writing.job, again.job)
    times = []
    while not again.tokens:
        scheduler.step()
        times.append(engine.now)
    assert max(after - before for before, after in itertools.pairwise(times)) <= 0.13
    assert again.job.cached == 20 * BLOCK_TOKENS


def test_a_known_beginning_is_not_read_again() -> None:
    engine = Pretended(slots=1)
    scheduler = Scheduler(engine, prefixes=PrefixCache(1 << 20))
    system = [3] * (2 * BLOCK_TOKENS + 5)
    [first] = served(scheduler, request_of([*system, 1, 2]))
    [second] = served(scheduler, request_of([*system, 4, 4]))
    assert (first.job.cached, second.job.cached) == (0, 2 * BLOCK_TOKENS)
    assert scheduler.counts["prompt_tokens_cached"] == 2 * BLOCK_TOKENS
    longer = [*second.request.ids, *second.tokens, *[8] * BLOCK_TOKENS]
    [again] = served(scheduler, request_of(longer))
    assert again.job.cached == 2 * BLOCK_TOKENS  # a block of the answer was not full


@pytest.mark.parametrize("limit", [0, 3])
def test_the_queue_is_bounded_and_in_order(limit: int) -> None:
    scheduler = Scheduler(Pretended(slots=1), queue_limit=limit)
    # one takes the free slot
    clients = submitted(scheduler, *(request_of([n]) for n in range(1 + limit)))
    with pytest.raises(QueueFullError, match=f"{limit} requests"):
        scheduler.submit(Client(request_of([9])).job)
    ended: list[int] = []
    while not scheduler.idle:
        scheduler.step()
        ended += [n for n, c in enumerate(clients) if c.reasons and n not in ended]
    assert ended == [*range(1 + limit)]


def test_jobs_of_one_request_are_queued_together_or_not_at_all() -> None:
    scheduler = Scheduler(Pretended(slots=2), queue_limit=1)
    scheduler.submit(*(Client(request_of([n])).job for n in range(9)))
    with pytest.raises(QueueFullError, match="7 requests"):
        scheduler.submit(Client(request_of([1])).job, Client(request_of([2])).job)
    assert len(scheduler.queue) == 9


def test_time_runs_out_in_the_queue_and_in_a_slot() -> None:
    now = 0.0
    engine = Pretended(slots=1)
    scheduler = Scheduler(engine, clock=lambda: now)
    times = ((50, 10.0), (50, 5.0), (2, 100.0))
    requests = (request_of([n], new, deadline=t) for n, (new, t) in enumerate(times, 1))
    running, waiting, last = submitted(scheduler, *requests)
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
    with pytest.raises(QueueFullError, match="stopping"):
        scheduler.submit(Client(request_of([3])).job)
    run(scheduler)
    assert running.reasons == ["length"]
    assert running.tokens == plain_loop(running.request)
    assert waiting.reasons == ["refused"]


def test_an_error_of_the_engine_ends_what_runs_and_no_more() -> None:
    engine = Pretended(slots=2)
    scheduler = Scheduler(engine)
    broken = submitted(scheduler, *(request_of([n], 9) for n in range(3)))
    scheduler.step()
    scheduler.fail()
    assert [client.reasons for client in broken] == [["error"]] * 3
    served(scheduler, request_of([4, 5]))


def random_prompts(known: int, *lengths: int) -> list[list[int]]:
    """Prompts of which every second one begins with so many known tokens."""
    random = torch.Generator().manual_seed(3)
    shared = torch.randint(3, 96, (known,), generator=random).tolist()
    own = [torch.randint(3, 96, (n,), generator=random).tolist() for n in lengths]
    return [shared * (number % 2) + ids for number, ids in enumerate(own)]


@pytest.mark.usefixtures("settled")
@pytest.mark.parametrize("kind", [pytest.param("ours", marks=needs_kernels), "transformers"])
def test_greedy_tokens_are_those_of_generate(tmp_path: Path, kind: str) -> None:
    """With a real model: nine sequences, four slots, a prefix cache, three orders of arrival."""
    folder = packed_model(tmp_path, head_dim=16, max_position_embeddings=256)
    model = secateur.load(folder, dtype=torch.float32)
    prompts = random_prompts(40, 1, 7, 9, 30, 70, 2, 8, 33, 5)
    expected = []
    for ids in prompts:
        out = model.generate(
            torch.tensor([ids]), max_new_tokens=20, do_sample=False, eos_token_id=None,
            pad_token_id=0,
        )  # fmt: skip
        expected.append(out[0, len(ids) :].tolist())
    for order in (1, 2, 4) if kind == "ours" else (2,):
        transformers = TransformersEngine(model, 200)
        engine = SlotDecoder(model, 200, 4) if kind == "ours" else transformers
        cache = PrefixCache(1 << 22 if kind == "ours" else 0)
        piece = 24 if kind == "ours" else engine.capacity
        scheduler = Scheduler(engine, prefixes=cache, most_piece=piece)
        clients = [Client(request_of(ids, 20)) for ids in prompts]
        for number in range(len(clients)):
            scheduler.submit(clients[number * order % 9].job)
            for _ in range(order - 1):
                scheduler.step()
        run(scheduler)
        assert [client.tokens for client in clients] == expected
        if kind == "ours":
            assert scheduler.counts["prompt_tokens_cached"] >= 2 * BLOCK_TOKENS
            assert scheduler.counts["decode_calls"] < 9 * 20 / 2  # several at once


@needs_kernels
@pytest.mark.parametrize("kv_cache", [None, "bf16", "int8"])
@pytest.mark.parametrize("stored", [{"values": "int8"}, {"values": "int4", "group_size": 32}])
def test_pieces_change_no_bit(tmp_path: Path, stored: dict[str, Any], kv_cache: str | None) -> None:
    """With values of integers: other pieces, other neighbours, and what the cache knows."""
    folder = packed_model(tmp_path, head_dim=16, max_position_embeddings=512, **stored)
    model = secateur.load(folder, dtype=torch.float32)
    prompts = random_prompts(70, 1, 300, 8, 9, 230, 33)

    def logits_of(scheduler: Scheduler, *wanted: Sequence[int]) -> list[Tensor]:
        found: list[list[Tensor]] = [[] for _ in wanted]
        for ids, rows in zip(wanted, found, strict=True):
            client = Client(request_of(ids, 6))
            client.job.take = lambda _, logits, rows=rows: rows.append(logits) or True
            scheduler.submit(client.job)
        run(scheduler)
        return [torch.stack(rows) for rows in found]

    alone = Scheduler(SlotDecoder(model, 400, 1, cache=kv_cache))
    expected = [logits_of(alone, ids)[0] for ids in prompts]
    for piece, cache in ((16, 0), (23, 1 << 22), (512, 1 << 22)):
        decoder, prefixes = SlotDecoder(model, 400, 5, cache=kv_cache), PrefixCache(cache)
        scheduler = Scheduler(decoder, prefixes=prefixes, most_piece=piece)
        for _ in range(2):
            found = logits_of(scheduler, *prompts)
            assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
        assert (scheduler.counts["prompt_tokens_cached"] > 0) == (cache > 0)


@needs_kernels
@pytest.mark.parametrize("kv_cache", [None, "int8"])
@pytest.mark.parametrize("drafted", [False, True])
def test_windows_change_no_bit(tmp_path: Path, drafted: bool, kv_cache: str | None) -> None:
    """Prompts and answers longer than a ring, beside caches that keep all: slots, prefixes, draft.

    In a small prefix cache beginnings get lost that rings have lost as well.
    """
    sizes = {"head_dim": 16, "max_position_embeddings": 2048, "sliding_window": 9}
    folder = packed_model(tmp_path, "gemma3", values="int8", **sizes)
    model = secateur.load(folder, dtype=torch.float32)
    prompts = random_prompts(710, 1, 300, 8, 9, 790)
    wanted = [*zip(prompts, (900, 5, 9, 700, 5), strict=True)]

    def tokens_of(scheduler: Scheduler) -> list[list[int]]:
        clients = submitted(scheduler, *(request_of(ids, new) for ids, new in wanted))
        run(scheduler, 100_000)
        return [client.tokens for client in clients]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(caches, "held_positions", lambda tokens, _: -(-tokens // 64) * 64)
        expected = tokens_of(Scheduler(SlotDecoder(model, 1700, 1, cache=kv_cache)))
    for piece, limit in ((200, 0), (512, 1 << 18), (512, 1 << 24)):
        engine = SlotDecoder(model, 1700, 3, cache=kv_cache)
        drafter = None
        if drafted:
            drafter = eager(3, 0)
            drafter.decoder, drafter.vocabulary = SlotDecoder(model, 1700, 3), 96
        prefixes = PrefixCache(limit)
        scheduler = Scheduler(engine, prefixes=prefixes, most_piece=piece, drafter=drafter)
        for _ in range(2):
            assert tokens_of(scheduler) == expected
        assert not drafted or scheduler.counts["draft_tokens_accepted"] > 500
        if limit == 1 << 24:  # everything is found again, long answers as well
            assert scheduler.counts["prompt_tokens_cached"] > 1500
            [ids, _], text = wanted[0], expected[0]
            assert len(prefixes.find([*ids, *text])) == (len(ids) + len(text) - 1) // BLOCK_TOKENS


@pytest.mark.slow
def test_many_draws_have_the_models_distribution() -> None:
    """100,000 tokens of a language in which a token depends on the one before, by chi-squared."""
    states, random = 8, torch.Generator().manual_seed(2)
    table = torch.randn(states, states, generator=random)
    guesses = table + torch.randn(states, states, generator=random)

    def engine(logits: Tensor) -> Any:
        made = Pretended(4, capacity=10_000)
        made.logits = lambda slot: logits[made.texts[slot][-1]]  # type: ignore[method-assign]
        return made

    drafter = eager(4, 0)
    drafter.decoder, drafter.vocabulary = engine(guesses), states
    scheduler = Scheduler(engine(table), drafter=drafter)
    draws = (Sampling(temperature=1.0, seed=n) for n in range(20))
    requests = (Request([n % states], 5_000, drawn) for n, drawn in enumerate(draws))
    clients = submitted(scheduler, *requests)
    run(scheduler, 100_000)
    counts = torch.zeros(states, states, dtype=torch.float64)
    for client in clients:
        for pair in itertools.pairwise([*client.request.ids, *client.tokens]):
            counts[pair] += 1
    assert counts.sum() == 100_000
    assert 0.3 < drafter.accepted / drafter.proposed < 0.9
    expected = counts.sum(1, keepdim=True) * table.double().softmax(1)
    statistic = float(((counts - expected) ** 2 / expected).sum())
    assert chi2.sf(statistic, states * (states - 1)) > 1e-3


# --- the prefix cache, against a plain table of all beginnings that were added

N = BLOCK_TOKENS
BLOCK_BYTES = N * 4


def tensor_of(text: list[int], begin: int, end: int) -> Tensor:
    """Stands for keys and values: they depend on all tokens up to the end of the block."""
    return torch.tensor([hash(tuple(text[: i + 1])) % 10**6 for i in range(begin, end)]).int()


def add(cache: PrefixCache, text: list[int]) -> None:
    cache.add(text, lambda begin, end: tensor_of(text, begin, end))


def block(kind: int, rest: int = 0) -> list[int]:
    return [kind, rest, *range(N - 2)]


TEXTS = st.lists(
    st.tuples(st.lists(st.integers(0, 2), min_size=1, max_size=4), st.integers(0, N - 1)),
    min_size=1,
    max_size=25,
)


@settings(max_examples=80, deadline=None)
@given(TEXTS, st.integers(1, 8))
def test_what_is_found_was_added_and_memory_is_bounded(texts, room: int) -> None:
    cache = PrefixCache(room * BLOCK_BYTES)
    known: set[tuple[int, ...]] = set()
    for kinds, extra in texts:
        text = [token for kind in kinds for token in block(kind)] + [77] * extra
        found = cache.find(text)
        assert len(found) * N < len(text)  # the last token is always read
        for number, tensor in enumerate(found):
            assert tuple(text[: (number + 1) * N]) in known
            assert torch.equal(tensor, tensor_of(text, number * N, (number + 1) * N))
        add(cache, text)
        known |= {tuple(text[:end]) for end in range(N, len(text) + 1, N)}
        assert cache.bytes <= room * BLOCK_BYTES
        assert cache.bytes == sum(b.known.nbytes for b in cache.blocks.values())
        whole = min(len(text) // N, room)
        assert len(cache.find([*text, 5])) >= whole  # what was added last is there
        numbers = {0, *(b.number for b in cache.blocks.values())}
        assert {before for before, _ in cache.blocks} <= numbers  # no block without its beginning


def test_the_longest_unused_goes_first() -> None:
    cache = PrefixCache(3 * BLOCK_BYTES)
    for kind in (1, 2, 3):
        add(cache, block(kind))
    assert cache.find([*block(1), 0])
    add(cache, block(4))
    assert [kind for kind in (1, 2, 3, 4) if cache.find([*block(kind), 0])] == [1, 3, 4]


def test_no_memory_keeps_nothing_and_copies_nothing() -> None:
    cache = PrefixCache(0)
    cache.add(block(1), lambda begin, end: 1 / 0)  # type: ignore[arg-type, return-value]
    assert cache.find([*block(1), 0]) == []
