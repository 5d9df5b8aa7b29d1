"""What `bench` returns."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from secateur.evaluation.speed import Speed
from secateur.reporting.results.result import Result
from secateur.reporting.tables import Block, Line, Table
from secateur.reporting.wording import binary_size

GAIN = 1.02
"""Smallest ratio of tokens per second that counts as faster."""


@dataclass(frozen=True, repr=False)
class BenchResult(Result):
    """Speed and memory of a model, run in several ways.

    Attributes:
        model: the name from the user.
        compressed: whether the model has packed weights.
        speeds: one measurement per contender.
        file_bytes: size of the weight files.
        dense_bytes: size of the same weights in dense bfloat16.
        protocol: how and on which machine it was measured.
    """

    model: str
    compressed: bool
    speeds: list[Speed]
    file_bytes: int
    dense_bytes: int
    protocol: dict[str, Any]

    def gain(self, over: Sequence[str]) -> tuple[str, float] | None:
        """The fastest contender in `over`, and how many times as fast `packed` is."""
        ran = {s.name: s.tokens_per_second for s in self.speeds if s.failure is None}
        others = {name: ran[name] for name in over if name in ran}
        if "packed" not in ran or not others:
            return None
        best = max(others, key=lambda name: others[name])
        return best, ran["packed"] / others[best]

    @property
    def verdict(self) -> str:
        """A sentence: how much faster the packed model is than the fastest of all others."""
        found = self.gain([s.name for s in self.speeds if not s.name.startswith("packed")])
        if found is None and not self.compressed:
            return (
                "the model is not compressed, so its zeros are multiplied: "
                f"secateur compress {shlex.quote(self.model)} --output SMALL"
            )
        if found is None:
            return "nothing to compare: the packed model or all others could not run"
        best, ratio = found
        if ratio < GAIN:
            return f"no gain: {best} is as fast or faster ({1 / ratio:.2f} times)"
        return f"{ratio:.2f} times as fast as {best}, the fastest of the others"

    @property
    def failures(self) -> dict[str, list[str]]:
        """The contenders that could not run, grouped by reason."""
        found: dict[str, list[str]] = {}
        for speed in self.speeds:
            if speed.failure is not None:
                found.setdefault(speed.failure, []).append(speed.name)
        return found

    def to_json(self) -> dict[str, Any]:
        """All measurements."""
        prompt = self.protocol["prompt_tokens"]
        return {
            "model": self.model,
            "contenders": [s.to_json(prompt) for s in self.speeds],
            "file_bytes": self.file_bytes,
            "dense_bytes": self.dense_bytes,
            "verdict": self.verdict,
            "protocol": self.protocol,
        }

    def blocks(self) -> Sequence[Block]:
        """A row for each contender that ran, then sizes, verdict and protocol."""
        p = self.protocol
        rows = [
            contender_row(s.to_json(p["prompt_tokens"])) for s in self.speeds if s.failure is None
        ]
        columns = ("", "tokens/s", "least to most", "first token", "prompt tokens/s", "memory")
        return [
            Table.of(self.model, columns, rows),
            Line(
                f"weight files {binary_size(self.file_bytes)}; dense bfloat16 would be "
                f"{binary_size(self.dense_bytes)}"
            ),
            Line(self.verdict),
            Line(
                f"{p['cpu']}, {p['threads']} threads, kernels {p['kernels']}; batch 1, prompt of "
                f"{p['prompt_tokens']} tokens, {p['new_tokens']} new ones, medians of "
                f"{p['rounds']} rounds in turns"
            ),
        ]


def contender_row(numbers: dict[str, Any]) -> tuple[str, ...]:
    """The table row of one contender."""
    return (
        numbers["contender"],
        f"{numbers['tokens_per_second']:.1f}",
        f"{numbers['tokens_per_second_least']:.1f} to {numbers['tokens_per_second_most']:.1f}",
        f"{1e3 * numbers['first_token_seconds']:.0f} ms",
        f"{numbers['prompt_tokens_per_second']:.0f}",
        binary_size(numbers["resident_bytes"]),
    )
