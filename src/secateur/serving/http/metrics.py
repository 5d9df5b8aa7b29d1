"""Numbers for Prometheus, in its text format."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from secateur.serving.scheduler import Scheduler

KNOWN = (
    "/",
    "/detokenize",
    "/health",
    "/metrics",
    "/tokenize",
    "/v1/chat/completions",
    "/v1/completions",
    "/v1/models",
)


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
        s = self.scheduler
        counts = s.counts
        lines: list[str] = []

        def add(name: str, kind: str, help: str, *values: tuple[str, float]) -> None:
            lines.append(f"# HELP secateur_{name} {help}")
            lines.append(f"# TYPE secateur_{name} {kind}")
            lines.extend(f"secateur_{name}{labels} {value:.10g}" for labels, value in values)

        add(
            "http_responses_total",
            "counter",
            "Answers by path and status.",
            *(
                (f'{{path="{path}",status="{status}"}}', count)
                for (path, status), count in sorted(self.answers.items())
            ),
        )
        add(
            "requests_ended_total",
            "counter",
            "Requests by the reason of their end.",
            *((f'{{reason="{r}"}}', n) for r, n in sorted(counts.ended.items())),
        )
        add("requests_running", "gauge", "Requests in a slot.", ("", len(s.running)))
        add("requests_waiting", "gauge", "Requests in the queue.", ("", len(s.queue)))
        add("prompt_tokens_total", "counter", "Tokens of prompts.", ("", counts.prompt_tokens))
        add(
            "prompt_tokens_cached_total",
            "counter",
            "Tokens of prompts that the prefix cache knew.",
            ("", counts.cached_tokens),
        )
        add("new_tokens_total", "counter", "Tokens written.", ("", counts.new_tokens))
        add("decode_calls_total", "counter", "Calls of the decoder.", ("", counts.calls))
        add("prefix_cache_bytes", "gauge", "Size of the prefix cache.", ("", s.prefixes.bytes))
        add(
            "first_token_seconds",
            "summary",
            "Time from a request to its first text.",
            ("_sum", self.first_seconds),
            ("_count", self.firsts),
        )
        return "\n".join(lines) + "\n"
