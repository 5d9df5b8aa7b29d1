"""From a prompt to pieces of text: what the HTTP layer needs of a model, and no HTTP."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import Tensor

from secateur.models.tokenizer import Tokenizer
from secateur.runtime.sampling import Sampling
from secateur.runtime.text import TextStream
from secateur.serving.scheduler import Request, ServingJob
from secateur.serving.worker import Worker

__all__ = ["Answer", "End", "Piece", "Service", "TokenChance"]


class TokenChance(NamedTuple):
    """A token of an answer, and how likely it was.

    Args:
        text: of the token.
        log_probability: natural logarithm, before temperature and penalties.
        others: the most likely tokens in its place, with theirs.
    """

    text: str
    log_probability: float
    others: list[tuple[str, float]]


class Piece(NamedTuple):
    """A piece of an answer."""

    text: str
    chances: list[TokenChance]


class End(NamedTuple):
    """The end of an answer: why, its number of tokens, and those of the prompt that were known."""

    reason: str
    tokens: int
    cached: int


@dataclass
class Answer:
    """Pieces of an answer on their way from the worker's thread to an event loop.

    Args:
        prompt_tokens: of the prompt.
        events: pieces, and then the end.
    """

    prompt_tokens: int
    events: asyncio.Queue[Piece | End] = field(default_factory=asyncio.Queue)
    job: ServingJob | None = None


@dataclass
class Service:
    """A model that answers.

    Args:
        name: of the model.
        tokenizer: reads prompts.
        writer: another copy of it, which the worker's thread uses.
        worker: computes.
        capacity: tokens that prompt and answer may have together.
        ends: tokens that end a text.
        defaults: options of `Sampling` where a request gives none.
        time_limit_seconds: of a request, from its arrival.
    """

    name: str
    tokenizer: Tokenizer
    writer: Tokenizer
    worker: Worker
    capacity: int
    ends: frozenset[int]
    defaults: dict[str, Any]
    time_limit_seconds: float
    created: int = field(default_factory=lambda: int(time.time()))

    def __post_init__(self) -> None:
        # one thread: a tokenizer must not be used by two, and the event loop must not wait for it
        self.reader = ThreadPoolExecutor(1, thread_name_prefix="secateur-tokenizer")

    async def conversation(self, messages: Sequence[dict[str, str]]) -> list[int]:
        """The tokens of a conversation, up to the start of the answer.

        Raises:
            Exception: what the template raises.
        """
        return await self.in_reader(lambda: self.templated(messages))

    def templated(self, messages: Sequence[dict[str, str]]) -> list[int]:
        """The tokens of a conversation; in the reader's thread."""
        text = self.tokenizer.apply_chat_template(
            list(messages), tokenize=False, add_generation_prompt=True
        )
        return list(self.tokenizer(str(text), add_special_tokens=False)["input_ids"])

    async def text(self, text: str) -> list[int]:
        """The tokens of a text, with what the tokenizer puts in front."""
        return await self.in_reader(lambda: list(self.tokenizer(text)["input_ids"]))

    async def in_reader(self, work: Callable[[], list[int]]) -> list[int]:
        """Run something in the thread of the tokenizer."""
        return await asyncio.get_running_loop().run_in_executor(self.reader, work)

    def ask(
        self,
        ids: Sequence[int],
        max_new_tokens: int,
        sampling: Sampling,
        *,
        stop: Sequence[str] = (),
        alternatives: int | None = None,
    ) -> Answer:
        """Begin to answer a prompt; called in an event loop, which receives the pieces.

        Args:
            ids: the prompt.
            max_new_tokens: the limit.
            sampling: how tokens are drawn.
            stop: the answer ends before the first of these.
            alternatives: list so many tokens beside each one; None: no list.

        Raises:
            QueueFullError: too many wait, or the server is stopping.
        """
        answer, loop, chances = Answer(len(ids)), asyncio.get_running_loop(), list[TokenChance]()

        def send(event: Piece | End) -> None:
            if not loop.is_closed():
                loop.call_soon_threadsafe(answer.events.put_nowait, event)

        def tell(text: str) -> None:
            send(Piece(text, [*chances]))
            chances.clear()

        def take(token: int, logits: Tensor) -> bool:
            if alternatives is not None:
                chances.append(self.chance(token, logits, alternatives))
            return stream.add(token)

        def end(reason: str) -> None:
            stream.finish()
            if chances:
                send(Piece("", [*chances]))
            send(End(reason, len(job.text), job.cached))

        stream = TextStream(self.writer, stop, tell)
        deadline = self.worker.scheduler.clock() + self.time_limit_seconds
        request = Request(ids, max_new_tokens, sampling, self.ends, deadline)
        answer.job = job = ServingJob(request, take, end)
        self.worker.submit(job)
        return answer

    def chance(self, token: int, logits: Tensor, others: int) -> TokenChance:
        """How likely a token was, and the most likely ones."""
        logs = logits.log_softmax(-1)
        best = logs.topk(min(others, len(logs)))
        return TokenChance(
            str(self.writer.decode([token])),
            float(logs[token]),
            [
                (str(self.writer.decode([other])), log)
                for log, other in zip(best.values.tolist(), best.indices.tolist(), strict=True)
            ],
        )
