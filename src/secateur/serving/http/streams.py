"""Answers that end when their client goes: a whole one, or a stream of events."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, TypeVar

from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from secateur.serving.http.answers import Writer
from secateur.serving.http.faults import ApiError
from secateur.serving.http.metrics import Metrics
from secateur.serving.service import Answer, End, Piece
from secateur.serving.worker import Worker

__all__ = ["AnswerResponse"]

T = TypeVar("T")

SEND_SECONDS = 60.0
"""The longest time for a client to take a part of a stream. Its text is computed all the same."""

EVENTS = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache")]


class AnswerResponse(Response):
    """Sends an answer, and cancels its job if the client goes first.

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
        self.answer, self.writer, self.worker = answer, writer, worker
        self.metrics, self.stream = metrics, stream
        self.begun = time.monotonic()
        self.status_code, self.background = 200, None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        sending = self.send_stream(send) if self.stream else self.send_whole(scope, receive, send)
        try:
            await until_gone(receive, sending)
        finally:
            if self.answer.job is not None:
                self.worker.cancel(self.answer.job)  # does nothing where it has ended

    async def events(self) -> AsyncIterator[Piece | End]:
        """Pieces as they come; the last one is the end."""
        first = True
        while True:
            event = await self.answer.events.get()
            if first and isinstance(event, Piece):
                self.metrics.first_token(time.monotonic() - self.begun)
                first = False
            yield event
            if isinstance(event, End):
                return

    async def send_whole(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send one JSON when everything has been computed."""
        pieces: list[Piece] = []
        async for event in self.events():
            if isinstance(event, Piece):
                pieces.append(event)
            elif (fault := fault_of(event)) is not None:
                await fault.response()(scope, receive, send)
            else:
                body = self.writer.whole(self.answer, pieces, event)
                await JSONResponse(body)(scope, receive, send)

    async def send_stream(self, send: Send) -> None:
        """Send each piece as an event. All pieces that have come are sent together."""
        await send({"type": "http.response.start", "status": 200, "headers": EVENTS})
        await self.put(send, self.writer.first(), more=True)
        async for event in self.events():
            parts = [self.written(event)]
            while not isinstance(event, End) and not self.answer.events.empty():
                event = self.answer.events.get_nowait()
                parts.append(self.written(event))
            ended = isinstance(event, End)
            await self.put(send, b"".join(parts), more=not ended)
            if ended:
                return

    def written(self, event: Piece | End) -> bytes:
        """An event as it is sent."""
        if isinstance(event, Piece):
            return self.writer.piece(event)
        fault = fault_of(event)
        return self.writer.last(self.answer, event) if fault is None else fault.event()

    async def put(self, send: Send, body: bytes, *, more: bool) -> None:
        """Send a part of the body."""
        if body or not more:
            part = {"type": "http.response.body", "body": body, "more_body": more}
            await asyncio.wait_for(send(part), SEND_SECONDS)


async def until_gone(receive: Receive, sending: Awaitable[Any]) -> None:
    """Wait for a coroutine, or until the client has gone."""
    tasks = [asyncio.ensure_future(sending), asyncio.ensure_future(gone(receive))]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()
        results = await asyncio.gather(*tasks, return_exceptions=True)
    if isinstance(results[0], Exception) and not isinstance(results[0], asyncio.TimeoutError):
        raise results[0]


async def gone(receive: Receive) -> None:
    """Wait until the client has gone."""
    while (await receive())["type"] != "http.disconnect":
        pass


def fault_of(end: End) -> ApiError | None:
    """The error that an end is; None if it is an ordinary one."""
    faults: dict[str, Callable[[], ApiError]] = {
        "timeout": lambda: ApiError(504, "the request took too long", code="timeout"),
        "refused": lambda: ApiError(503, "the server is stopping", code="server_stopping"),
        "error": lambda: ApiError(500, "the model failed; the server's log says why"),
        "cancelled": lambda: ApiError(500, "the request was cancelled", code="cancelled"),
    }
    return faults[end.reason]() if end.reason in faults else None
