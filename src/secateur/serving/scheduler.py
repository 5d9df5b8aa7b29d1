"""Decides which tokens of which requests are computed next. It knows no threads and no HTTP.

Keys and values of beginnings that several prompts share, such as a system message, are kept.
`TransformersEngine` is for models that our own loop does not take.
"""

from __future__ import annotations

import math
import threading
import time
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from secateur.errors import SecateurError, ShapeError
from secateur.recipes.deploy import Sampling
from secateur.runtime.decode import SlotDecoder, SteppedGeneration, Token
from secateur.runtime.grammar import Grammar, GrammarError
from secateur.runtime.sampling import Draws
from secateur.runtime.speculative import DraftedText, Drafter, Guess, verified

Engine: TypeAlias = "SlotDecoder | TransformersEngine"
"""What computes tokens."""


class QueueFullError(SecateurError):
    """As many requests wait as may wait."""


@dataclass(frozen=True)
class Request:
    """What a client wants.

    Args:
        ids: the prompt, at least one token.
        max_new_tokens: the limit; 0 only reads the prompt.
        sampling: how tokens are drawn.
        ends: tokens that end the text; they are not passed on.
        grammar: what the text follows; None: anything.
        deadline: the time of the scheduler's clock at which the request ends; None for never.
    """

    ids: Sequence[int]
    max_new_tokens: int
    sampling: Sampling
    ends: frozenset[int] = frozenset()
    grammar: Grammar | None = None
    deadline: float | None = None


@dataclass(eq=False)
class ServingJob:
    """A request on its way.

    Args:
        request: what is wanted.
        take: receives each token, and the logits that it was drawn from; returns False to end the
            text.
        end: receives the reason when the job ends: `stop`, `length`, `grammar` (no token can
            follow), `cancelled`, `timeout`, `refused` or `error`. It is called once.
        score: receives the logits after each token of the prompt, a piece of it at a time. Such a
            prompt is read whole, because the prefix cache has no logits.

    Attributes:
        cancelled: set by whoever no longer wants it, from any thread.
        text: the tokens passed on so far.
        last: the token that ended the text, and its logits; None if none did.
        cached: tokens of the prompt that the prefix cache knew.
        kept: tokens that were offered to the prefix cache.
        turn: when a piece of the prompt was read last; the scheduler counts turns.
        owed: whether a piece of another prompt was read since the last token.
    """

    request: Request
    take: Callable[[int, Tensor], bool]
    end: Callable[[str], None]
    score: Callable[[Tensor], None] | None = None
    cancelled: bool = False
    slot: int = -1
    text: list[int] = field(default_factory=list)
    last: tuple[int, Tensor] | None = None
    cached: int = 0
    kept: int = 0
    turn: int = 0
    owed: bool = False

    def __post_init__(self) -> None:
        grammar = self.request.grammar
        begun = None if grammar is None else grammar.begin()
        self.draws = Draws(self.request.sampling, self.request.ids, begun)


LEAST_PIECE = 16
"""Tokens of the smallest piece of a prompt: fewer take nearly as long, because all weights are read
once for each piece."""

MOST_PIECE = 512
"""Tokens of a piece that delays nobody. The kernels gain nothing from more."""

FORGETTING = 0.9
"""What was measured counts so much less with each later piece."""

AIM = 0.9
"""The part of the time for a piece that is used: no piece takes exactly as long as the last one."""


class _PromptTimes:
    """How long pieces of prompts take, from those that were read.

    seconds = tokens · each + tokens · position · deeper + fixed, by least squares of the relative
    errors, with no factor below 0. What the measurements do not tell apart is in the first factor:
    then a larger piece takes at most as long as expected.

    Attributes:
        largest: tokens of a piece that was measured. No prediction is made for more than twice
            as many.
    """

    def __init__(self) -> None:
        self.products = [[0.0] * 3 for _ in range(3)]
        self.sums, self.factors = [0.0] * 3, [0.0] * 3
        self.largest = 0.0

    def note(self, tokens: int, first: int, seconds: float) -> None:
        """Add a measurement: a piece that begins at a position."""
        # divided by the measured time: least squares of these are those of the relative errors
        row = [x / seconds for x in (tokens, tokens * (first + tokens / 2), 1.0)]
        for i, x in enumerate(row):
            self.sums[i] = FORGETTING * self.sums[i] + x
            for j, y in enumerate(row):
                self.products[i][j] = FORGETTING * self.products[i][j] + x * y
        self.largest = max(float(tokens), FORGETTING * self.largest)
        for _ in range(40):  # coordinate descent on the normal equations, no factor below 0
            for i, own in enumerate(self.products):
                others = sum(own[j] * self.factors[j] for j in range(3) if j != i)
                self.factors[i] = max(0.0, (self.sums[i] - others) / own[i])

    def tokens_within(self, seconds: float, first: int) -> int:
        """The tokens of the largest piece that takes at most so long."""
        each, deeper, fixed = self.factors
        low, high = 0, int(2 * self.largest)  # bisection: the time grows with the tokens
        while low < high:
            tokens = (low + high + 1) // 2
            expected = tokens * (each + deeper * (first + tokens / 2)) + fixed
            low, high = (tokens, high) if expected <= seconds else (low, tokens - 1)
        return low


class Scheduler:
    """Continuous batching: every call computes a token of each running request.

    A step admits waiting requests to free slots, reads at most one piece of one long prompt, and
    decodes. A piece is as large as the time between two tokens of the others allows, by what pieces
    and calls took so far. Where nobody waits for a token, pieces are large. Prompts take turns.
    With more running requests than a call takes, requests take turns too, and the next piece comes
    after the token of the last one.

    A prompt that fits in a call of the engine is read in the places that no other request needs.
    Every other prompt is read in pieces, whatever the cache knows of it, so where `read` computes
    the same for any pieces, what is computed does not depend on others.

    `submit`, `cancel` and `close` may be called from any thread, everything else from one.

    Args:
        engine: computes tokens.
        queue_limit: if so many jobs wait for a slot, new ones are refused.
        prefixes: what is known of prompts.
        drafter: proposes tokens where a call has room for them; needs a `SlotDecoder`.
        gap_seconds: between two tokens of a request, while prompts of others are read.
        most_piece: tokens of the largest piece.
        clock: seconds; a monotonic clock.

    Attributes:
        counts: `prompt_tokens` of all prompts that were admitted, `prompt_tokens_cached` of these,
            `new_tokens` that were passed on, `draft_tokens` and `draft_tokens_accepted`, and
            `decode_calls` of the engine.
        ended: requests by the reason of their end.
    """

    def __init__(
        self,
        engine: Engine,
        *,
        queue_limit: int = 64,
        prefixes: PrefixCache | None = None,
        drafter: Drafter | None = None,
        gap_seconds: float = 0.1,
        most_piece: int = MOST_PIECE,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.engine, self.queue_limit, self.clock = engine, queue_limit, clock
        self.prefixes, self.drafter = prefixes or PrefixCache(0), drafter
        self.gap_seconds, self.most_piece = gap_seconds, most_piece
        self.piece_times, self.call_seconds, self.turns = _PromptTimes(), 0.0, 0
        self.lock = threading.Lock()
        self.queue: deque[ServingJob] = deque()
        self.running: list[ServingJob] = []
        self.free = list(range(len(engine.lengths)))
        self.counts, self.ended = Counter[str](), Counter[str]()
        self.closed = False

    def submit(self, *jobs: ServingJob) -> None:
        """Put the jobs of one request into the queue, all or none.

        The limit counts those that wait already, so a request may have more jobs than the limit.

        Raises:
            QueueFullError: too many wait, or the scheduler is closed.
        """
        with self.lock:
            if self.closed:
                raise QueueFullError("the server is stopping")
            # the next step gives free slots away, so as many jobs do not wait
            waiting = len(self.queue) - len(self.free)
            if waiting >= self.queue_limit:
                raise QueueFullError(f"{waiting} requests are waiting already")
            self.queue += jobs

    def close(self) -> None:
        """Refuse new jobs and those that wait. Those that run go on."""
        with self.lock:
            self.closed = True

    @property
    def idle(self) -> bool:
        """Whether nothing runs and nothing waits."""
        return not self.running and not self.queue

    def step(self) -> None:
        """Compute something for those that run. Call it again while not `idle`."""
        self.drop()
        self.admit()
        self.read()
        self.decode()

    def drop(self) -> None:
        """End what was cancelled, what is too late, and after `close` what waits."""
        now = self.clock()
        with self.lock:
            reasons = [(job, "refused" if self.closed else _why(job, now)) for job in self.queue]
            self.queue = deque(job for job, reason in reasons if reason is None)
        reasons += [(job, _why(job, now)) for job in self.running]
        for job, reason in reasons:
            if reason is not None:
                self.finish(job, reason)

    def admit(self) -> None:
        """Give free slots to those that wait, the longest waiting first."""
        while self.free:
            with self.lock:
                if not self.queue:
                    return
                job, job.slot = self.queue.popleft(), self.free.pop()
            self.running.append(job)
            self.engine.rewind(job.slot)
            self.counts["prompt_tokens"] += len(job.request.ids)

    def unread(self, job: ServingJob) -> Sequence[int]:
        """The tokens of a job's prompt that the engine has not read."""
        return job.request.ids[self.engine.lengths[job.slot] :]

    def in_pieces(self, job: ServingJob) -> bool:
        """Whether a prompt is read in pieces, not along with the tokens of others."""
        whole = job.score is None and len(job.request.ids) <= self.engine.together
        return not job.text and not whole

    def read(self) -> None:
        """Read a piece of a long prompt: of the one that waits longest for its turn."""
        long = [job for job in self.running if self.in_pieces(job)]
        others = [job for job in self.running if not self.in_pieces(job)]
        if not long or any(job.owed for job in others):
            return
        began = self.clock()
        job = min(long, key=lambda job: job.turn)
        self.turns += 1
        job.turn = self.turns
        for other in others:
            other.owed = True
        # a call decodes for at most `together` texts; the piece gets what is left of the gap
        calls = math.ceil(len(others) / self.engine.together)
        seconds = AIM * (self.gap_seconds - calls * self.call_seconds) if others else math.inf
        if not self.recall(job, began + seconds):
            return
        first, rest = self.engine.lengths[job.slot], self.unread(job)
        left, began, most = began + seconds - self.clock(), self.clock(), self.most_piece
        if others:
            within = self.piece_times.tokens_within(left, first)
            most = min(max(within, LEAST_PIECE), most)
        size = math.ceil(len(rest) / math.ceil(len(rest) / most))  # pieces of about one size
        ids = torch.tensor(rest[:size])
        logits = self.engine.read(job.slot, ids, every=job.score is not None)
        if job.score is not None:
            job.score(logits)
        self.keep(job)
        if others:
            self.piece_times.note(size, first, max(self.clock() - began, 1e-6))
        if size == len(rest):
            self.answer(job, logits[-1:])

    def recall(self, job: ServingJob, until: float) -> bool:
        """Copy what the cache knows of a prompt by now. Return False if time ran out first."""
        found = self.prefixes.find(job.request.ids) if job.score is None else []
        length = self.engine.lengths[job.slot]
        whole = length // BLOCK_TOKENS
        if len(found) <= whole:
            return True
        self.engine.rewind(job.slot, whole * BLOCK_TOKENS)
        for known in found[whole:]:
            self.engine.copy_in(job.slot, known)
            if self.clock() >= until:
                break
        new = self.engine.lengths[job.slot] - length
        job.cached += new
        self.counts["prompt_tokens_cached"] += new
        return self.clock() < until

    def decode(self) -> None:
        """Compute one call: the last token of each text, and proposals or short prompts."""
        texts = [job for job in self.running if job.text]
        short = [job for job in self.running if not job.text and not self.in_pieces(job)]
        room = self.engine.together - bool(short)
        if not texts and not short:
            return
        jobs, tokens = texts[:room], list[Token]()
        guesses = [*self.proposals(jobs, 0 if short else room - len(jobs))]
        began = self.clock()
        for job, proposed in zip(jobs, guesses, strict=True):
            begin = self.engine.lengths[job.slot]
            ids = [job.text[-1], *(guess.token for guess in proposed)]
            tokens += [Token(job.slot, begin + n, id) for n, id in enumerate(ids)]
        for job in short:
            rest, begin = self.unread(job), self.engine.lengths[job.slot]
            here = rest[: self.engine.together - len(tokens)]
            for number, id in enumerate(here, start=1):
                tokens.append(Token(job.slot, begin + number - 1, id, number == len(rest)))
            if here and len(here) == len(rest):
                jobs.append(job)
                guesses.append([])
        logits = self.engine.step(tokens)
        self.counts["decode_calls"] += 1
        self.running = [*(job for job in self.running if job not in jobs), *jobs]
        # for each text the logits after its last token, then after each proposed one
        rows, before = logits.split([1 + len(x) for x in guesses]), self.counts["new_tokens"]
        for job, proposed, own in zip(jobs, guesses, rows, strict=True):
            # a window may lose keys and values, so a long text is kept from time to time
            if self.engine.lengths[job.slot] - job.kept >= MOST_PIECE or not job.text:
                self.keep(job)
            job.owed = False
            self.answer(job, own, proposed)
        seconds = self.clock() - began
        if self.drafter is not None and not short:
            self.drafter.called(guesses, seconds, self.counts["new_tokens"] - before)
        self.call_seconds += (seconds - self.call_seconds) * (0.2 if self.call_seconds else 1.0)

    def proposals(self, jobs: Sequence[ServingJob], room: int) -> list[list[Guess]]:
        """What the draft proposes for each text, in so many places of a call."""
        if self.drafter is None:
            return [[] for _ in jobs]
        texts = []
        for job in jobs:
            ids = [*job.request.ids, *job.text]
            most = job.request.max_new_tokens - len(job.text) - 1
            texts.append(DraftedText(job.slot, ids, job.draws, most))
        return self.drafter.propose(texts, room)

    def keep(self, job: ServingJob) -> None:
        """Keep the keys and values of the tokens of a job, before a window has lost them."""
        slot = job.slot
        ids = [*job.request.ids, *job.text][: self.engine.lengths[slot]]
        job.kept = len(ids)
        self.prefixes.add(ids, lambda begin, end: self.engine.copy_out(slot, begin, end))

    def answer(self, job: ServingJob, logits: Tensor, proposed: Sequence[Guess] = ()) -> None:
        """Pass on what a call gives a job: the tokens accepted of a proposal, and one more.

        Args:
            job: the job.
            logits: after the text or prompt, and after each proposed token.
            proposed: tokens.
        """
        if job.request.max_new_tokens == 0:
            self.finish(job, "length")
            return
        first = self.engine.lengths[job.slot] - len(proposed)
        try:
            tokens = [*verified(job.draws, logits, proposed)]
        except GrammarError:
            if proposed:
                self.engine.rewind(job.slot, first)
            self.finish(job, "grammar")
            return
        if self.drafter is not None:
            self.drafter.judged(proposed, len(tokens))
            self.counts["draft_tokens"] = self.drafter.proposed
            self.counts["draft_tokens_accepted"] = self.drafter.accepted
        for number, token in enumerate(tokens, start=1):
            reason = self.take(job, token, logits[number - 1])
            if proposed and (reason or number == len(tokens)):  # forget what was not accepted
                self.engine.rewind(job.slot, first + number - 1)
            if reason:
                self.finish(job, reason)
                return

    def take(self, job: ServingJob, token: int, logits: Tensor) -> str | None:
        """Pass on a token. Return why the job ends with it, if it does."""
        if token in job.request.ends:
            job.last = token, logits
            return "stop"
        job.text.append(token)
        self.counts["new_tokens"] += 1
        if not job.take(token, logits):
            return "stop"
        return "length" if len(job.text) >= job.request.max_new_tokens else None

    def finish(self, job: ServingJob, reason: str) -> None:
        """End a job and free its slot."""
        if job in self.running:
            self.running.remove(job)
            self.keep(job)
            self.free.append(job.slot)
        self.ended[reason] += 1
        job.end(reason)

    def fail(self) -> None:
        """End everything after an error of the engine; the slots are empty again."""
        with self.lock:
            waiting, self.queue = [*self.queue], deque()
        running, self.running = self.running, []
        self.free += [job.slot for job in running]
        for job in (*running, *waiting):
            self.ended["error"] += 1
            job.end("error")


def _why(job: ServingJob, now: float) -> str | None:
    """Why a job ends before its text does; None if it does not."""
    if job.cancelled:
        return "cancelled"
    deadline = job.request.deadline
    return "timeout" if deadline is not None and now >= deadline else None


BLOCK_TOKENS = 32
"""Tokens are kept in blocks of this many. A shorter block finds more, and costs more to look up."""

Key = tuple[int, tuple[int, ...]]
"""The number of the block before this one, and the tokens of this one."""

START = 0
"""The number before the first block."""


class _KnownBlock(NamedTuple):
    """Keys and values of some tokens after a known beginning."""

    number: int
    known: Tensor


class PrefixCache:
    """A tree of blocks of tokens, with a bound on its memory.

    A block is found by its tokens and all tokens before it, compared as they are, so two texts
    never share what they do not have in common. When memory is short, the block goes that was not
    used for the longest time. A block is used whenever one after it is, so the tree loses leaves
    only.

    Args:
        limit_bytes: of all keys and values together; 0 keeps nothing.

    Attributes:
        bytes: of all keys and values together.
    """

    def __init__(self, limit_bytes: int) -> None:
        self.limit_bytes = limit_bytes
        self.bytes = 0
        self.blocks: OrderedDict[Key, _KnownBlock] = OrderedDict()  # the longest unused first
        self.numbers = 0

    def walk(self, ids: Sequence[int]) -> Iterator[tuple[int, Key, _KnownBlock | None]]:
        """Where each whole block begins, its key, and what is known of it; ends after the first
        unknown one.
        """
        number = START
        for begin in range(0, len(ids) - BLOCK_TOKENS + 1, BLOCK_TOKENS):
            key = number, tuple(ids[begin : begin + BLOCK_TOKENS])
            block = self.blocks.get(key)
            yield begin, key, block
            # `add` may have put an unknown block in its place meanwhile
            if (block := self.blocks.get(key)) is None:
                return
            number = block.number

    def find(self, ids: Sequence[int]) -> list[Tensor]:
        """Keys and values of the longest known beginning, block by block.

        Args:
            ids: a prompt. Its last token is never part of what is found, because it has to be
                read for its logits.
        """
        path = [(key, block) for _, key, block in self.walk(ids[:-1]) if block is not None]
        self.use([key for key, _ in path])
        return [block.known for _, block in path]

    def add(self, ids: Sequence[int], copy: Callable[[int, int], Tensor | None]) -> None:
        """Keep the whole blocks of a text.

        Args:
            ids: the text.
            copy: gives keys and values of the positions from one number to another; None if they
                are no longer there. Then nothing behind them is kept either.
        """
        if self.limit_bytes == 0:
            return
        path: list[Key] = []
        for begin, key, block in self.walk(ids):
            if block is None:
                known = copy(begin, begin + BLOCK_TOKENS)
                if known is None:
                    break
                self.numbers += 1
                self.blocks[key] = _KnownBlock(self.numbers, known)
                self.bytes += known.nbytes
            path.append(key)
        self.use(path)
        while self.bytes > self.limit_bytes:
            _, block = self.blocks.popitem(last=False)
            self.bytes -= block.known.nbytes

    def use(self, path: Sequence[Key]) -> None:
        """Note that blocks are used, the last of a path first."""
        for key in reversed(path):  # so the beginning of a text is the last to be forgotten
            self.blocks.move_to_end(key)


class TransformersEngine:
    """One sequence, decoded by transformers' `generate`: no prefixes, and prompts are read whole.

    Args:
        model: a transformers causal language model in eval mode.
        capacity: the number of tokens that fit.

    Attributes:
        lengths: how many tokens the slot has.
        together: 1.
    """

    together = 1

    def __init__(self, model: Any, capacity: int) -> None:
        self.steps = SteppedGeneration(model)
        self.capacity, self.lengths = capacity, [0]

    def read(self, slot: int, ids: Tensor, *, every: bool = False) -> Tensor:
        """Read a whole prompt; returns the logits after it, or after each token [kept, vocabulary].

        The logits of all tokens need a forward of their own, because `generate` has only the last.
        """
        if self.lengths[slot]:
            raise ShapeError("a prompt has to be read at once")
        logits = self.steps.prefill(ids)[None]
        self.lengths[slot] = len(ids)
        if every:
            with torch.inference_mode():
                out = self.steps.model(input_ids=ids[None].to(self.steps.model.device))
            logits = torch.cat((out.logits[0, :-1].float().cpu(), logits))
        return logits

    def step(self, tokens: Sequence[Token]) -> Tensor:
        """Append one token; returns the logits after it [1, vocabulary]."""
        (token,) = tokens
        if not self.lengths[token.slot]:  # a prompt of one token
            return self.read(token.slot, torch.tensor([token.id]))
        logits = self.steps.step(token.id)
        self.lengths[token.slot] += 1
        return logits[None]

    def rewind(self, slot: int, length: int = 0) -> None:
        """Forget all tokens."""
        if length:
            raise ShapeError(f"cannot go back to {length} tokens")
        self.steps.close()
        self.lengths[slot] = 0

    def copy_out(self, slot: int, begin: int, end: int) -> Tensor:
        """Not possible: keys and values are inside of transformers."""
        raise ShapeError("keys and values cannot be copied")

    def copy_in(self, slot: int, known: Tensor) -> None:
        """Not possible."""
        raise ShapeError("keys and values cannot be copied")
