"""What every request passes: the key, the size of its body, the time that it may take, and the
count of the answers, for Prometheus.
"""

from __future__ import annotations

import asyncio
import hmac
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from secateur.serving.http.requests import ApiError
from secateur.serving.scheduler import Scheduler

OPEN = ("/health", "/metrics")
"""Paths that need no key."""


@dataclass(frozen=True)
class Limits:
    """Lets a request through to the application, or refuses it.

    The whole body is read here, before the application sees the request. So a body that is too long
    or too slow costs nothing but its own connection.

    Args:
        app: the application.
        metrics: counts answers.
        api_key: what clients send as a bearer token; None: everybody may ask.
        body_bytes: the longest body.
        body_seconds: the longest time for a body to arrive.
    """

    app: ASGIApp
    metrics: Metrics
    api_key: str | None
    body_bytes: int
    body_seconds: float

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        path = scope["path"]

        async def counted(message: Message) -> None:
            if message["type"] == "http.response.start":
                self.metrics.answered(path, message["status"])
            await send(message)

        try:
            self.check_key(scope)
            body = await asyncio.wait_for(self.read_body(scope, receive), self.body_seconds)
        except ApiError as error:
            await error.response()(scope, receive, counted)
            return
        except asyncio.TimeoutError:
            late = f"the body took longer than {self.body_seconds:g} seconds"
            response = ApiError(408, late).response()
            response.headers["Connection"] = "close"
            await response(scope, receive, counted)
            return
        if body is not None:
            await self.app(scope, _after(body, receive), counted)

    def check_key(self, scope: Scope) -> None:
        """Refuse a request without the key."""
        if self.api_key is None or scope["path"] in OPEN:
            return
        given = dict(scope["headers"]).get(b"authorization", b"")
        if not hmac.compare_digest(given, b"Bearer " + self.api_key.encode()):
            raise ApiError(401, "the API key is missing or wrong", code="invalid_api_key")

    async def read_body(self, scope: Scope, receive: Receive) -> bytes | None:
        """The body; None if the client has gone."""
        too_long = ApiError(
            413, f"the body is longer than {self.body_bytes:,} bytes", code="body_too_large"
        )
        stated = dict(scope["headers"]).get(b"content-length", b"0")
        if stated.isdigit() and int(stated) > self.body_bytes:
            raise too_long
        parts, size = [], 0
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                return None
            parts.append(message.get("body", b""))
            size += len(parts[-1])
            if size > self.body_bytes:
                raise too_long
            if not message.get("more_body"):
                return b"".join(parts)


def _after(body: bytes, receive: Receive) -> Receive:
    """A `receive` that gives a body that was read, and then what comes after it."""
    given = False

    async def receive_again() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return receive_again


KNOWN = {*OPEN, "/v1/chat/completions", "/v1/completions", "/v1/models"}


@dataclass
class Metrics:
    """Counts what a server answers, and reads what its scheduler counts.

    Args:
        scheduler: of the server.
    """

    scheduler: Scheduler
    answers: Counter[tuple[str, int]] = field(default_factory=Counter)
    first_seconds: float = 0.0
    firsts: int = 0

    def answered(self, path: str, status: int) -> None:
        """Count an answer. Paths that do not exist are counted together."""
        self.answers[path if path in KNOWN else "other", status] += 1

    def first_token(self, seconds: float) -> None:
        """Count the time from a request to its first piece of text."""
        self.first_seconds += seconds
        self.firsts += 1

    def text(self) -> str:
        """All numbers, in Prometheus's text format."""
        s, found = self.scheduler, self.scheduler.counts
        answers = sorted(self.answers.items())
        paths = {f'{{path="{path}",status="{status}"}}': n for (path, status), n in answers}
        ended = {f'{{reason="{reason}"}}': n for reason, n in sorted(found.ended.items())}
        first = {"_sum": self.first_seconds, "_count": self.firsts}
        table: tuple[tuple[str, str, str, Mapping[str, float]], ...] = (
            ("http_responses_total", "counter", "Answers by path and status.", paths),
            ("requests_ended_total", "counter", "Requests by the reason of their end.", ended),
            ("requests_running", "gauge", "Requests in a slot.", {"": len(s.running)}),
            ("requests_waiting", "gauge", "Requests in the queue.", {"": len(s.queue)}),
            ("prompt_tokens_total", "counter", "Tokens of prompts.", {"": found.prompt_tokens}),
            ("prompt_tokens_cached_total", "counter",
             "Tokens of prompts that the prefix cache knew.", {"": found.cached_tokens}),
            ("new_tokens_total", "counter", "Tokens written.", {"": found.new_tokens}),
            ("draft_tokens_total", "counter", "Tokens that the draft proposed.",
             {"": found.proposed_tokens}),
            ("draft_tokens_accepted_total", "counter", "Proposed tokens that were accepted.",
             {"": found.accepted_tokens}),
            ("decode_calls_total", "counter", "Calls of the decoder.", {"": found.calls}),
            ("prefix_cache_bytes", "gauge", "Size of the prefix cache.", {"": s.prefixes.bytes}),
            ("first_token_seconds", "summary", "Time from a request to its first text.", first),
        )  # fmt: skip
        lines = list[str]()
        for name, kind, help, values in table:
            lines += [f"# HELP secateur_{name} {help}", f"# TYPE secateur_{name} {kind}"]
            lines += [f"secateur_{name}{label} {value:.10g}" for label, value in values.items()]
        return "\n".join(lines) + "\n"
