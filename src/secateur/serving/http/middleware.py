"""What every request passes: the key, and the count of the answers, for Prometheus."""

from __future__ import annotations

import hmac
from collections import Counter
from collections.abc import Iterator

from prometheus_client import core
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from secateur.serving.http.requests import ApiError
from secateur.serving.scheduler import Scheduler

OPEN = ("/health", "/metrics")
"""Paths that need no key."""

KNOWN = {*OPEN, "/v1/chat/completions", "/v1/completions", "/v1/models"}


def guarded(app: ASGIApp, metrics: Metrics, api_key: str | None) -> ASGIApp:
    """The application for clients with the key; all answers are counted.

    A request without the key is refused before its body is read.

    Args:
        app: the application.
        metrics: counts answers.
        api_key: what clients send as a bearer token; None: everybody may ask.
    """
    wanted = b"Bearer " + (api_key or "").encode()

    async def guard(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await app(scope, receive, send)
            return

        async def counted(message: Message) -> None:
            if message["type"] == "http.response.start":
                path = scope["path"] if scope["path"] in KNOWN else "other"
                metrics.answers[path, message["status"]] += 1
            await send(message)

        given = dict(scope["headers"]).get(b"authorization", b"")
        known = api_key is None or scope["path"] in OPEN or hmac.compare_digest(given, wanted)
        fault = ApiError(401, "the API key is missing or wrong", code="invalid_api_key")
        await (app if known else fault.response())(scope, receive, counted)

    return guard


class Metrics:
    """Counts what a server answers, and reads what its scheduler counts: a collector of Prometheus.

    Args:
        scheduler: of the server.

    Attributes:
        answers: how many by path and status. Paths that do not exist are counted together.
        first_seconds: the times from requests to their first pieces of text, summed.
        firsts: how many such times there are.
    """

    def __init__(self, scheduler: Scheduler) -> None:
        self.scheduler, self.answers = scheduler, Counter[tuple[str, int]]()
        self.first_seconds, self.firsts = 0.0, 0

    def first_token(self, seconds: float) -> None:
        """Count the time from a request to its first piece of text."""
        self.first_seconds += seconds
        self.firsts += 1

    def collect(self) -> Iterator[core.Metric]:
        """All numbers."""
        found = self.scheduler
        answers = core.CounterMetricFamily(
            "secateur_http_responses", "Answers by path and status.", labels=("path", "status")
        )
        for (path, status), count in sorted(self.answers.items()):
            answers.add_metric((path, str(status)), count)
        ended = core.CounterMetricFamily(
            "secateur_requests_ended", "Requests by the reason of their end.", labels=("reason",)
        )
        for reason, count in sorted(found.ended.items()):
            ended.add_metric((reason,), count)
        yield from (answers, ended)
        for name, help, number in (
            ("requests_running", "Requests in a slot.", len(found.running)),
            ("requests_waiting", "Requests in the queue.", len(found.queue)),
            ("prefix_cache_bytes", "Size of the prefix cache.", found.prefixes.bytes),
        ):
            yield core.GaugeMetricFamily(f"secateur_{name}", help, number)
        for name, help in COUNTS.items():
            yield core.CounterMetricFamily(f"secateur_{name}", help, found.counts[name])
        yield core.SummaryMetricFamily(
            "secateur_first_token_seconds",
            "Time from a request to its first text.",
            self.firsts,
            self.first_seconds,
        )


COUNTS = {
    "prompt_tokens": "Tokens of prompts.",
    "prompt_tokens_cached": "Tokens of prompts that the prefix cache knew.",
    "new_tokens": "Tokens written.",
    "draft_tokens": "Tokens that the draft proposed.",
    "draft_tokens_accepted": "Proposed tokens that were accepted.",
    "decode_calls": "Calls of the decoder.",
}
"""The names of `Scheduler.counts`."""
