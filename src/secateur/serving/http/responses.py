"""What a server answers: the JSON of OpenAI's API, whole or as a stream of events.

An answer ends when its client goes.
"""

from __future__ import annotations

import json
import secrets
import time
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from typing import Any

from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from secateur.serving.http.middleware import Metrics
from secateur.serving.http.requests import ApiError
from secateur.serving.service import Answer, End, Piece, TokenChance, Worker
from secateur.serving.tools import CallReader, ToolCall

DONE = b"data: [DONE]\n\n"


@dataclass
class Writer(ABC):
    """Writes the answer of one request.

    Args:
        model: the name of the model.
        listed: whether tokens are listed with their probabilities.
        include_usage: whether a stream ends with its usage.
        warnings: what was ignored. The answer has them, or the first chunk of a stream.
        calls: makes what finds the calls of tools in a text; None where there are no tools.
    """

    model: str
    listed: bool = False
    include_usage: bool = False
    warnings: Sequence[str] = ()
    calls: Callable[[], CallReader] | None = None

    prefix = kind = chunk_kind = ""

    def __post_init__(self) -> None:
        own = {"id": self.prefix + secrets.token_hex(12), "created": int(time.time())}
        self.own = own | {"model": self.model}

    def head(self, kind: str) -> dict[str, Any]:
        """What every answer and chunk begins with."""
        head: dict[str, Any] = {**self.own, "object": kind}
        if self.warnings:
            head["warnings"], self.warnings = [*self.warnings], ()
        return head

    def usage(self, answer: Answer, ends: Sequence[End]) -> dict[str, Any]:
        """How many tokens were read and written. Choices of one prompt count it once."""
        read, new = answer.prompt_tokens, sum(end.tokens for end in ends)
        # choices of one prompt found the same tokens known
        cached = {"cached_tokens": sum(end.cached for end in ends[:: answer.each])}
        sizes = {"prompt_tokens": read, "completion_tokens": new, "total_tokens": read + new}
        return {**sizes, "prompt_tokens_details": cached}

    def whole(
        self, answer: Answer, pieces: Sequence[Sequence[Piece]], ends: Sequence[End]
    ) -> dict[str, Any]:
        """The answer of a request that is no stream; pieces and end of each choice."""
        choices = []
        for number, (own, end) in enumerate(zip(pieces, ends, strict=True)):
            text = "".join(piece.text for piece in own)
            chances = [chance for piece in own for chance in piece.chances]
            choice = self.choice(number, text, chances)
            called = "tool_calls" in choice.get("message", ())
            choices.append(choice | {"finish_reason": _reason(end, called)})
        return self.head(self.kind) | {"choices": choices, "usage": self.usage(answer, ends)}

    def event(self, choices: list[dict[str, Any]], usage: dict[str, Any] | None = None) -> bytes:
        """A chunk of a stream."""
        chunk: dict[str, Any] = self.head(self.chunk_kind) | {"choices": choices}
        if self.include_usage:
            chunk["usage"] = usage
        return b"data: " + json.dumps(chunk, ensure_ascii=False).encode() + b"\n\n"

    def first(self, choices: int) -> bytes:
        """What a stream of so many choices begins with."""
        return b""

    def piece(self, number: int, piece: Piece) -> bytes:
        """A piece of a choice in a stream."""
        delta = self.delta(number, piece.text, piece.chances)
        return self.event([delta | {"finish_reason": None}])

    def end(self, number: int, end: End) -> bytes:
        """The end of a choice in a stream."""
        return self.event([self.delta(number, None, []) | {"finish_reason": end.reason}])

    def last(self, answer: Answer, ends: Sequence[End]) -> bytes:
        """What a stream ends with."""
        usage = self.event([], self.usage(answer, ends)) if self.include_usage else b""
        return usage + DONE

    @abstractmethod
    def choice(self, number: int, text: str, chances: Sequence[TokenChance]) -> dict[str, Any]:
        """A choice itself."""

    @abstractmethod
    def delta(
        self, number: int, text: str | None, chances: Sequence[TokenChance]
    ) -> dict[str, Any]:
        """A piece of it; None is nothing more."""


class ChatWriter(Writer):
    """Answers of `/v1/chat/completions`."""

    prefix, kind, chunk_kind = "chatcmpl-", "chat.completion", "chat.completion.chunk"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.readers: dict[int, CallReader] = {}  # of each choice of a stream

    def choice(self, number: int, text: str, chances: Sequence[TokenChance]) -> dict[str, Any]:
        """The message."""
        message: dict[str, Any] = {"role": "assistant", "content": text}
        if self.calls is not None:
            reader = self.calls()
            (first, calls), (rest, last) = reader.add(text), reader.finish()
            message["content"] = first + rest or None
            if listed := [_called(call) for call in (*calls, *last)]:
                message["tool_calls"] = listed
        return {"index": number, "message": message, "logprobs": self.logprobs(chances)}

    def piece(self, number: int, piece: Piece) -> bytes:
        """A piece of a message. Calls come whole, and what may become one waits."""
        if self.calls is None:
            return super().piece(number, piece)
        reader = self.readers.setdefault(number, self.calls())
        return self.part(number, *reader.add(piece.text), piece.chances)

    def part(
        self, number: int, text: str, calls: Sequence[ToolCall], chances: Sequence[TokenChance]
    ) -> bytes:
        """Text and calls of a message; nothing where there are none."""
        if not text and not calls and not chances:
            return b""
        delta = self.delta(number, text or None, chances)
        if calls:
            first = self.readers[number].found - len(calls)
            listed = enumerate(calls, start=first)
            delta["delta"]["tool_calls"] = [{"index": n, **_called(call)} for n, call in listed]
        return self.event([delta | {"finish_reason": None}])

    def end(self, number: int, end: End) -> bytes:
        """The end of a message, after what waited."""
        if number not in self.readers:
            return super().end(number, end)
        reader = self.readers[number]
        rest = self.part(number, *reader.finish(), [])
        return rest + super().end(number, end._replace(reason=_reason(end, reader.found > 0)))

    def delta(
        self, number: int, text: str | None, chances: Sequence[TokenChance]
    ) -> dict[str, Any]:
        """A piece of the message."""
        content = {} if text is None else {"content": text}
        return {"index": number, "delta": content, "logprobs": self.logprobs(chances)}

    def first(self, choices: int) -> bytes:
        """The role of each message."""
        content = "" if self.calls is None else None  # a call has no content
        begin = {"delta": {"role": "assistant", "content": content}, "finish_reason": None}
        return b"".join(self.event([{"index": number, **begin}]) for number in range(choices))

    def logprobs(self, chances: Sequence[TokenChance]) -> dict[str, Any] | None:
        """The list of tokens."""
        if not self.listed:
            return None
        content = []
        for c in chances:
            top = [self.entry(text, log) for text, log in c.others]
            content.append(self.entry(c.text, c.log_probability) | {"top_logprobs": top})
        return {"content": content}

    def entry(self, text: str, log_probability: float | None) -> dict[str, Any]:
        """A token of the list."""
        return {"token": text, "logprob": log_probability, "bytes": list(text.encode())}


def _called(call: ToolCall) -> dict[str, Any]:
    """A call as OpenAI's API writes it."""
    function = {"name": call.name, "arguments": call.arguments}
    return {"id": f"call_{secrets.token_hex(12)}", "type": "function", "function": function}


def _reason(end: End, called: bool) -> str:
    """Why a choice ended; `called`: whether it calls tools."""
    return "tool_calls" if called and end.reason == "stop" else end.reason


class CompletionWriter(Writer):
    """Answers of `/v1/completions`."""

    prefix, kind, chunk_kind = "cmpl-", "text_completion", "text_completion"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.offsets = Counter[int]()  # characters before the next token of each choice

    def choice(self, number: int, text: str, chances: Sequence[TokenChance]) -> dict[str, Any]:
        """The text."""
        return {"index": number, "text": text, "logprobs": self.logprobs(number, chances)}

    def delta(
        self, number: int, text: str | None, chances: Sequence[TokenChance]
    ) -> dict[str, Any]:
        """A piece of the text."""
        return self.choice(number, text or "", chances)

    def logprobs(self, number: int, chances: Sequence[TokenChance]) -> dict[str, Any] | None:
        """The list of tokens, in the older form of this endpoint."""
        if not self.listed:
            return None
        offsets = []
        for chance in chances:
            offsets.append(self.offsets[number])
            self.offsets[number] += len(chance.text)
        return {
            "tokens": [c.text for c in chances],
            "token_logprobs": [c.log_probability for c in chances],
            "top_logprobs": [None if c.log_probability is None else c.named for c in chances],
            "text_offset": offsets,
        }


FAULTS = {
    "grammar": (400, "the text cannot go on as its grammar says, or it is too complex", "grammar"),
    "timeout": (504, "the request took too long", "timeout"),
    "refused": (503, "the server is stopping", "server_stopping"),
    "error": (500, "the model failed; the server's log says why", None),
    "cancelled": (500, "the request was cancelled", "cancelled"),
}
"""The ends that are errors: status, message and code."""


class AnswerResponse(StreamingResponse):
    """Sends an answer, and cancels its jobs if the client goes first.

    Args:
        answer: on its way.
        writer: of its JSON.
        worker: that computes it.
        metrics: receives the time to its first piece.
        stream: whether pieces are sent as they come.
    """

    def __init__(
        self, answer: Answer, writer: Writer, worker: Worker, metrics: Metrics, *, stream: bool
    ) -> None:
        kind, headers = "text/event-stream", {"cache-control": "no-cache"}
        super().__init__(self.chunks(), media_type=kind, headers=headers)
        self.answer, self.writer, self.worker = answer, writer, worker
        self.metrics, self.stream = metrics, stream
        self.begun, self.ends = time.monotonic(), dict[int, End]()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        self.request = scope, receive
        try:
            await super().__call__(scope, receive, send)
        finally:
            for job in self.answer.jobs:
                self.worker.cancel(job)  # does nothing where it has ended

    async def stream_response(self, send: Send) -> None:
        """Send the answer; starlette stops this when the client goes."""
        if self.stream:
            await super().stream_response(send)
            return
        try:
            response: Response = JSONResponse(await self.whole())
        except ApiError as error:
            response = error.response()
        await response(*self.request, send)

    async def events(self) -> AsyncIterator[list[tuple[int, Piece | End]]]:
        """What has come, together; until all choices have ended, or one with an error.

        Raises:
            ApiError: the error.
        """
        coming, first = self.answer.events, True
        while len(self.ends) < len(self.answer.jobs):
            come = [await coming.get()]
            while not coming.empty():  # one event for all tokens of the step of this moment
                come.append(coming.get_nowait())
            if first and isinstance(come[0][1], Piece):
                self.metrics.first_token(time.monotonic() - self.begun)
                first = False
            for place, (number, event) in enumerate(come):
                if isinstance(event, End):
                    if event.reason in FAULTS:
                        yield come[:place]
                        status, message, code = FAULTS[event.reason]
                        raise ApiError(status, message, code=code)
                    self.ends[number] = event
            yield come

    @property
    def ordered_ends(self) -> list[End]:
        """The ends of all choices."""
        return [self.ends[number] for number in range(len(self.ends))]

    async def whole(self) -> dict[str, Any]:
        """The answer when everything has been computed."""
        pieces: list[list[Piece]] = [[] for _ in self.answer.jobs]
        async for come in self.events():
            for number, event in come:
                if isinstance(event, Piece):
                    pieces[number].append(event)
        return self.writer.whole(self.answer, pieces, self.ordered_ends)

    async def chunks(self) -> AsyncIterator[bytes]:
        """The parts of a stream. All pieces that have come are in one part."""
        writer = self.writer
        yield writer.first(len(self.answer.jobs))
        try:
            async for come in self.events():
                yield b"".join(
                    writer.piece(number, event)
                    if isinstance(event, Piece)
                    else writer.end(number, event)
                    for number, event in come
                )
        except ApiError as error:
            yield error.event()
            return
        yield writer.last(self.answer, self.ordered_ends)
