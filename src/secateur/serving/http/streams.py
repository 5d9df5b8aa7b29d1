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

T = TypeVar("T")

SEND_SECONDS = 60.0
"""The longest time for a client to take a part of a stream. Its text is computed all the same."""

EVENTS = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache")]


class AnswerResponse(Response):
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
        self.answer, self.writer, self.worker = answer, writer, worker
        self.metrics, self.stream = metrics, stream
        self.begun, self.ends = time.monotonic(), dict[int, End]()
        self.status_code, self.background = 200, None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        sending = self.send_stream(send) if self.stream else self.send_whole(scope, receive, send)
        try:
            await until_gone(receive, sending)
        finally:
            for job in self.answer.jobs:
                self.worker.cancel(job)  # does nothing where it has ended

    async def events(self) -> AsyncIterator[list[tuple[int, Piece | End]]]:
        """What has come, together; until all choices have ended, or one with an error.

        Raises:
            ApiError: the error.
        """
        coming, first = self.answer.events, True
        while len(self.ends) < len(self.answer.jobs):
            come = [await coming.get()]
            while not coming.empty():
                come.append(coming.get_nowait())
            if first and isinstance(come[0][1], Piece):
                self.metrics.first_token(time.monotonic() - self.begun)
                first = False
            for place, (number, event) in enumerate(come):
                if isinstance(event, End):
                    if (fault := fault_of(event)) is not None:
                        yield come[:place]
                        raise fault
                    self.ends[number] = event
            yield come

    @property
    def ordered_ends(self) -> list[End]:
        """The ends of all choices."""
        return [self.ends[number] for number in range(len(self.ends))]

    async def send_whole(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send one JSON when everything has been computed."""
        pieces: list[list[Piece]] = [[] for _ in self.answer.jobs]
        try:
            async for come in self.events():
                for number, event in come:
                    if isinstance(event, Piece):
                        pieces[number].append(event)
        except ApiError as error:
            await error.response()(scope, receive, send)
            return
        body = self.writer.whole(self.answer, pieces, self.ordered_ends)
        await JSONResponse(body)(scope, receive, send)

    async def send_stream(self, send: Send) -> None:
        """Send each piece as an event. All pieces that have come are sent together."""
        await send({"type": "http.response.start", "status": 200, "headers": EVENTS})
        await self.put(send, self.writer.first(len(self.answer.jobs)), more=True)
        try:
            async for come in self.events():
                parts = [self.written(number, event) for number, event in come]
                await self.put(send, b"".join(parts), more=True)
        except ApiError as error:
            await self.put(send, error.event(), more=False)
            return
        await self.put(send, self.writer.last(self.answer, self.ordered_ends), more=False)

    def written(self, number: int, event: Piece | End) -> bytes:
        """An event as it is sent."""
        if isinstance(event, Piece):
            return self.writer.piece(number, event)
        return self.writer.end(number, event)

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
