"""From a prompt to pieces of text: what the HTTP layer needs of a model, and no HTTP.

A thread of its own computes. HTTP runs in another one, and gives it jobs.
"""

from __future__ import annotations

import asyncio
import contextlib
import sys
import threading
import time
import traceback
from asyncio import AbstractEventLoop
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property, partial
from itertools import product
from typing import Any, NamedTuple, TypeVar

from torch import Tensor

from secateur.machine import trim
from secateur.models.tokenizer import Tokenizer, text_bound
from secateur.recipes.deploy import Sampling
from secateur.runtime.grammar import Grammar, Grammars
from secateur.runtime.sampling import TextStream
from secateur.serving.scheduler import Request, Scheduler, ServingJob
from secateur.serving.tools import ToolFormat, tool_format


class Worker:
    """Runs a scheduler in a thread of its own until it is stopped.

    Args:
        scheduler: computes the jobs.

    Attributes:
        failures: how often the engine raised an error. Each ends all jobs of that moment.
        posted: calls that event loops make after the step of this moment. Waking a loop takes a
            system call, and the loop then takes the interpreter; once for each step is enough.
    """

    def __init__(self, scheduler: Scheduler) -> None:
        self.scheduler = scheduler
        self.posted: list[tuple[AbstractEventLoop, Callable[[], None]]] = []
        self.failures = 0
        self.stopping = False
        self.woken = threading.Event()
        self.thread = threading.Thread(target=self.run, name="secateur-worker", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self.thread.start()

    @property
    def alive(self) -> bool:
        """Whether jobs are computed."""
        return self.thread.is_alive()

    def submit(self, *jobs: ServingJob) -> None:
        """Give it the jobs of a request, all or none.

        Raises:
            QueueFullError: too many wait, or it is stopping.
        """
        self.scheduler.submit(*jobs)
        self.woken.set()

    def cancel(self, job: ServingJob) -> None:
        """End a job that nobody wants any more; its slot is free after the step of this moment."""
        job.cancelled = True
        self.woken.set()

    def close(self) -> None:
        """Refuse new jobs and those that wait; those that run go on."""
        self.scheduler.close()
        self.woken.set()

    def stop(self, timeout_seconds: float) -> bool:
        """End the thread, after the jobs that run if they end in time.

        Returns:
            Whether all of them ended by themselves.
        """
        self.close()
        self.stopping = True
        self.woken.set()
        self.thread.join(timeout_seconds)
        return not self.thread.is_alive()

    def run(self) -> None:
        """Compute while there is something to compute, else wait for the next job."""
        while True:
            if self.scheduler.idle:
                if self.stopping:
                    return
                self.woken.wait()
                # cleared before the queue is looked at again, so no job is missed
                self.woken.clear()
                continue
            try:
                self.scheduler.step()
            except Exception:  # the jobs of this moment end with an error, and the server goes on
                traceback.print_exc(file=sys.stderr)
                self.failures += 1
                self.scheduler.fail()
            self.deliver()

    def deliver(self) -> None:
        """Give event loops what was posted for them."""
        posted, self.posted = self.posted, []
        for loop in {loop for loop, _ in posted}:
            own = [call for other, call in posted if other is loop]
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
                loop.call_soon_threadsafe(_all, own)


def _all(calls: Sequence[Callable[[], None]]) -> None:
    for call in calls:
        call()


T = TypeVar("T")

LEAST = -9999.0
"""The log probability of a token that cannot come. JSON has no infinity."""


class TokenChance(NamedTuple):
    """A token, and how likely it was.

    Args:
        text: of the token.
        log_probability: natural logarithm, before temperature and penalties; None for the first
            token of a prompt, which nothing predicts.
        others: the most likely tokens in its place, the first one first.
    """

    text: str
    log_probability: float | None
    others: list[tuple[str, float]]

    @property
    def named(self) -> dict[str, float]:
        """The others by text. Bytes of characters share one, which the likeliest has."""
        found: dict[str, float] = {}
        for text, log in self.others:
            found.setdefault(text, log)
        return found


class Piece(NamedTuple):
    """A piece of a choice."""

    text: str
    chances: list[TokenChance]


class End(NamedTuple):
    """The end of a choice: why, its number of tokens, and those of the prompt that were known."""

    reason: str
    tokens: int
    cached: int


@dataclass
class Answer:
    """The choices of an answer on their way from the worker's thread to an event loop.

    Args:
        prompt_tokens: of all prompts together.
        each: choices for each prompt; those of the first prompt come first.
        jobs: one for each choice.
        events: pieces, and the end of each choice, with the number of the choice.
    """

    prompt_tokens: int
    each: int
    jobs: list[ServingJob] = field(default_factory=list)
    events: asyncio.Queue[tuple[int, Piece | End]] = field(default_factory=asyncio.Queue)


class _AnswerChoice:
    """Turns the tokens of one choice into pieces of text, in the worker's thread.

    Args:
        request: the prompt, and how it is answered.
        tokenizer: writes the tokens.
        send: receives the pieces and the end.
        stop: the choice ends before the first of these.
        alternatives: list so many tokens beside each one; None: no list.
        echo: the text of the prompt if the choice begins with it. With `alternatives` its tokens
            are listed too.
    """

    def __init__(
        self,
        request: Request,
        tokenizer: Tokenizer,
        send: Callable[[Piece | End], None],
        *,
        stop: Sequence[str],
        alternatives: int | None,
        echo: str | None,
    ) -> None:
        self.ids, self.tokenizer, self.send = request.ids, tokenizer, send
        self.alternatives, self.echo = alternatives, echo
        self.stream = TextStream(tokenizer, stop, self.tell)
        self.chances: list[TokenChance] = []
        scored = echo is not None and alternatives is not None
        if scored:
            self.chances.append(TokenChance(self.text_of(self.ids[0]), None, []))
        self.job = ServingJob(request, self.take, self.end, self.score if scored else None)

    def text_of(self, token: int) -> str:
        """The text of a token."""
        return str(self.tokenizer.decode([token]))

    def tell(self, text: str) -> None:
        """Send a piece."""
        self.send(Piece(text, self.chances))
        self.chances = []

    def send_echo_once(self) -> None:
        """Send the prompt if the choice begins with it."""
        if self.echo is not None:
            self.tell(self.echo)
            self.echo = None

    def score(self, logits: Tensor) -> None:
        """Note how likely the next tokens of the prompt were; each row predicts one."""
        rest = self.ids[len(self.chances) :]  # one row more at the end of the prompt
        self.chances += [self.chance(*pair) for pair in zip(rest, logits, strict=False)]

    def take(self, token: int, logits: Tensor) -> bool:
        """Add a token. Return False if the text ends."""
        self.send_echo_once()
        if self.alternatives is not None:
            self.chances.append(self.chance(token, logits))
        return self.stream.add(token)

    def end(self, reason: str) -> None:
        """Send what is left. The list has the token that ended the text, and the text has not."""
        self.send_echo_once()
        self.stream.finish()
        if self.job.last is not None and self.alternatives is not None:
            self.chances.append(self.chance(*self.job.last))
        if self.chances:
            self.tell("")
        self.send(End(reason, len(self.job.text), self.job.cached))

    def chance(self, token: int, logits: Tensor) -> TokenChance:
        """How likely a token was, and the most likely ones."""
        logs = logits.log_softmax(-1).clamp(min=LEAST)  # [vocabulary]
        best = logs.topk(min(self.alternatives or 0, len(logs)))
        pairs = zip(best.indices.tolist(), best.values.tolist(), strict=True)
        others = [(self.text_of(other), log) for other, log in pairs]
        return TokenChance(self.text_of(token), float(logs[token]), others)


LONG_TEXT = 1 << 14
"""More characters take longer than others should wait for: about 40 ms."""


@dataclass
class Service:
    """A model that answers.

    Args:
        name: of the model.
        tokenizer: reads prompts.
        worker: computes.
        capacity: tokens that prompt and answer may have together.
        vocabulary: how many tokens both the tokenizer and the model know.
        ends: tokens that end a text.
        defaults: options of `Sampling` where a request gives none.
        time_limit_seconds: of a request, from its arrival.
    """

    name: str
    tokenizer: Tokenizer
    worker: Worker
    capacity: int
    vocabulary: int
    ends: frozenset[int]
    defaults: dict[str, Any]
    time_limit_seconds: float
    created: int = field(default_factory=lambda: int(time.time()))

    def __post_init__(self) -> None:
        # The event loop must not wait for a tokenizer, and short texts not for long ones. A first
        # text sets the options of a fast tokenizer; then neither reading nor writing changes
        # anything in it, and several threads may use it at once. Others have one thread to read.
        self.tokenizer("")
        self.reader = ThreadPoolExecutor(1, thread_name_prefix="secateur-tokenizer")
        two = getattr(self.tokenizer, "is_fast", False)
        self.long_reader = ThreadPoolExecutor(1, "secateur-long-texts") if two else self.reader
        self.bound = text_bound(self.tokenizer)
        self.grammar_reader = ThreadPoolExecutor(1, thread_name_prefix="secateur-grammar")

    def fits(self, text: str) -> bool:
        """Whether a text may be short enough for a prompt, without reading it."""
        return self.bound is None or self.bound.fewest_tokens(text) <= self.capacity

    async def conversation(
        self, messages: Sequence[dict[str, str]], variables: Mapping[str, Any]
    ) -> str:
        """A conversation in the model's format, up to the start of the answer.

        Args:
            messages: role and content of each.
            variables: further ones of the chat template.

        Raises:
            Exception: what the template raises.
        """

        def written() -> str:
            return str(
                self.tokenizer.apply_chat_template(
                    list(messages), tokenize=False, add_generation_prompt=True, **variables
                )
            )

        return await self.in_reader(written)

    async def tokens(self, text: str, *, special: bool = True) -> list[int]:
        """The tokens of a text; with `special`, also what the tokenizer puts in front."""
        return await self.in_reader(
            lambda: list(self.tokenizer(text, add_special_tokens=special)["input_ids"]), len(text)
        )

    @cached_property
    def grammars(self) -> Grammars:
        """Reads grammars. To make it takes a second, and memory."""
        return Grammars(self.tokenizer, self.ends)

    @cached_property
    def tool_format(self) -> ToolFormat | None:
        """How the chat template writes calls of tools."""
        return tool_format(self.tokenizer)

    async def grammar(self, written: Callable[[], str]) -> Grammar:
        """Read a grammar (`Grammars.read`), in a thread of its own: it may take two seconds."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self.grammar_reader, lambda: self.grammars.of(written()))

    async def text(self, ids: Sequence[int]) -> str:
        """The text of tokens, special ones included."""
        return await self.in_reader(lambda: str(self.tokenizer.decode(list(ids))), len(ids))

    async def in_reader(self, work: Callable[[], T], size: int = 0) -> T:
        """Run something in a thread of the tokenizer: with characters or tokens, how many."""
        reader = self.long_reader if size > LONG_TEXT else self.reader
        try:
            return await asyncio.get_running_loop().run_in_executor(reader, work)
        finally:
            if size > LONG_TEXT:
                reader.submit(trim)  # glibc would keep what reading took

    def ask(
        self,
        prompts: Sequence[Sequence[int]],
        samplings: Sequence[Sampling],
        max_new_tokens: int,
        *,
        stop: Sequence[str] = (),
        alternatives: int | None = None,
        echo: Sequence[str] | None = None,
        ignore_ends: bool = False,
        grammar: Grammar | None = None,
    ) -> Answer:
        """Begin to answer prompts; called in an event loop, which receives the pieces.

        Args:
            prompts: the tokens of each.
            samplings: how tokens are drawn, once for each choice of a prompt.
            max_new_tokens: the limit of a choice; 0 only reads the prompts.
            stop: a choice ends before the first of these.
            alternatives: list so many tokens beside each one; None: no list.
            echo: the texts of the prompts, if choices begin with them.
            ignore_ends: no token ends a text.
            grammar: what the choices follow; None: anything.

        Raises:
            QueueFullError: too many wait, or the server is stopping. Nothing is computed then.
        """
        answer = Answer(sum(map(len, prompts)), len(samplings))
        loop = asyncio.get_running_loop()
        deadline = self.worker.scheduler.clock() + self.time_limit_seconds
        ends = frozenset[int]() if ignore_ends else self.ends

        def send(number: int, event: Piece | End) -> None:
            self.worker.posted.append((loop, partial(answer.events.put_nowait, (number, event))))

        for number, (prompt, sampling) in enumerate(product(range(len(prompts)), samplings)):
            choice = _AnswerChoice(
                Request(prompts[prompt], max_new_tokens, sampling, ends, grammar, deadline),
                self.tokenizer,
                partial(send, number),
                stop=stop,
                alternatives=alternatives,
                echo=None if echo is None else echo[prompt],
            )
            answer.jobs.append(choice.job)
        self.worker.submit(*answer.jobs)
        return answer
