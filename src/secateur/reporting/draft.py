"""What `draft` returns."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from secateur.evaluation.acceptance import too_fast
from secateur.reporting.fit import FittedResult
from secateur.reporting.next_steps import after_a_draft
from secateur.reporting.plan import FitPlanResult
from secateur.reporting.tables import Block, Line, Table, binary_size, with_error
from secateur.runs.records.measured import Acceptance, Speculation

LEAST_SPEEDUP = 1.05
"""A draft pays from here on: less is the error of timing, and not worth a second model."""


@dataclass(frozen=True)
class DraftPoint:
    """A draft that was predicted, and not made.

    Attributes:
        seconds: of a token.
        divergence: of the draft from the parent, in nats per token.
        acceptance: how often the parent takes a token.
        expected: what it gains.
    """

    seconds: float
    divergence: float
    acceptance: float
    expected: Speculation


@dataclass(frozen=True)
class DraftCandidate:
    """A draft that was made, measured on the windows that choose.

    Attributes:
        name: its number.
        file_bytes: of its weight files.
        divergence: from the parent, in nats per token.
        healed: whether it has learned from the parent.
        acceptance: how much of its text the parent takes.
        seconds: of one token.
        sampled: what it gains at temperature 1.
        greedy: what it gains in greedy decoding.
    """

    name: str
    file_bytes: int
    divergence: float
    healed: bool
    acceptance: Acceptance
    seconds: float
    sampled: Speculation
    greedy: Speculation


@dataclass(frozen=True)
class DraftHead:
    """An output head over some tokens only, with the draft that was chosen.

    Attributes:
        tokens: how many.
        acceptance: of the draft with this head, on the windows that choose.
        seconds: of one token of the draft with this head.
        gain: the speed-up that chooses: the geometric mean of both ways to decode.
    """

    tokens: int
    acceptance: Acceptance
    seconds: float
    gain: float


class DraftResult(FittedResult):
    """A draft, what it gains, and what it won against: `draft.json`.

    Attributes:
        parent: the model that it proposes to.
        head_tokens: the tokens that its head can propose.
        vocabulary: the tokens of the parent.
        parent_seconds: c(1), c(2), …: seconds of one call of the parent with so many tokens.
        draft_seconds: of one token of the draft.
        unhealed: what the parent takes before healing, on text that was used for nothing else; None
            where nothing was healed.
        acceptance: the same of the draft.
        sampled: what the draft gains at temperature 1, by `acceptance`.
        greedy: what it gains in greedy decoding, by `acceptance`.
        candidates: the drafts that were made, with their whole head.
        heads: the heads that were tried with the best of them.
        frontier: drafts that are predicted for other times of a token.
    """

    parent: str
    head_tokens: int
    vocabulary: int
    parent_seconds: tuple[float, ...]
    draft_seconds: float
    unhealed: Acceptance | None
    acceptance: Acceptance
    sampled: Speculation
    greedy: Speculation
    candidates: tuple[DraftCandidate, ...]
    heads: tuple[DraftHead, ...]
    frontier: tuple[DraftPoint, ...]

    @property
    def cost(self) -> float:
        """c_draft / c(1)."""
        return self.draft_seconds / self.parent_seconds[0]

    @property
    def broken(self) -> list[str]:
        """Why the draft does not pay, or why that is not known; nothing if it pays."""
        odd = too_fast(self.parent_seconds)
        if odd is not None:
            few, many = (f"{n} tokens took {1e3 * self.parent_seconds[n - 1]:.2f} ms" for n in odd)
            return [
                f"what the draft brings is not known: by the clock, one call of the parent with "
                f"{few}, and one with {many}. Other programs disturbed every measurement; try "
                "again on a quieter machine"
            ]
        best, k = max((self.sampled.speedup, self.sampled.k), (self.greedy.speedup, self.greedy.k))
        if best >= LEAST_SPEEDUP:
            return []
        k = max(k, 1)
        verify = self.parent_seconds[min(k, len(self.parent_seconds) - 1)] / self.parent_seconds[0]
        return [
            f"no draft pays here: the best one is expected to bring {best:.2f} x. The parent takes "
            f"{self.acceptance.mean:.0%} of its tokens ({self.acceptance.agreement:.0%} in greedy "
            f"decoding), a token of it costs {self.cost:.0%} of one of the parent, and the parent "
            f"reads {k + 1} tokens in {verify:.2f} times the time of one"
        ]

    def blocks(self) -> Sequence[Block]:
        """What the draft gains, what it won against, and the next commands."""
        first, head = self.parent_seconds[0], "all tokens"
        if self.head_tokens < self.vocabulary:
            head = f"{self.head_tokens:,} of {self.vocabulary:,} tokens"
        facts = [
            ("expected speed-up, temperature 1", _expected(self.sampled)),
            ("expected speed-up, greedy", _expected(self.greedy)),
            ("a token of the draft", f"{self.cost:.2f} of one of the parent"),
            ("one token of the parent", f"{1e3 * first:.2f} ms"),
            ("weight files", binary_size(self.packed.file_bytes)),
            ("head", head),
            *self.stored,
        ]
        taken = {"before healing": self.unhealed, "the draft": self.acceptance}
        accepted = [
            (
                name,
                with_error(x.mean, x.standard_error, ".3f"),
                with_error(x.agreement, x.agreement_standard_error, ".3f"),
            )
            for name, x in taken.items()
            if x is not None
        ]
        calls = [
            (str(n), f"{1e3 * each:.2f} ms", f"{each / first:.2f}")
            for n, each in enumerate(self.parent_seconds, start=1)
        ]
        blocks: list[Block] = [
            Table.facts("the draft", facts),
            Table.of("tokens that the parent takes", ("", "temperature 1", "greedy"), accepted),
            Table.of("one call of the parent", ("tokens", "time", "of one token"), calls, 0),
            *self._searched(),
            *(Line(f"Left out to keep the time: {x}.") for x in [", ".join(self.dropped)] if x),
            *(Line(fault, "bold red") for fault in self.broken),
        ]
        return blocks + after_a_draft(self.output, self.parent, pays=not self.broken)

    def _searched(self) -> Iterator[Block]:
        """What was made, tried and predicted."""
        first = self.parent_seconds[0]

        def row(seconds: float, found: Acceptance) -> tuple[str, ...]:
            return f"{seconds / first:.2f}", f"{found.mean:.3f}", f"{found.agreement:.3f}"

        made = [
            (
                f"{x.name}{', healed' if x.healed else ''}",
                *row(x.seconds, x.acceptance),
                f"{x.divergence:.4f}",
                *map(_short, (x.sampled, x.greedy)),
            )
            for x in self.candidates
        ]
        heads = [
            (f"{x.tokens:,}", *row(x.seconds, x.acceptance), f"{x.gain:.2f} x") for x in self.heads
        ]
        points = [
            (
                f"{x.seconds / first:.2f}",
                f"{x.acceptance:.3f}",
                f"{x.divergence:.4f}",
                _short(x.expected),
            )
            for x in self.frontier
        ]
        yield Line(EXPLAINED, "dim")
        title = "drafts that were made, on the text that chose"
        yield Table.of(title, ("", COST, *RATES, "nats", *GAINS), made)
        title = "heads over frequent tokens"
        yield Table.of(title, ("tokens", COST, *RATES, "gain"), heads, 0)
        title = "predicted for other drafts"
        yield Table.of(title, (COST, RATES[0], "nats", GAINS[0]), points, 0)


RATES, COST, GAINS = ("taken", "taken, greedy"), "cost", ("gain (k)", "greedy (k)")
"""Columns: what the parent takes, what a token of the draft costs, and what that brings."""

EXPLAINED = (
    "cost: time of a token, over one of the parent; taken: tokens of the draft, at temperature 1 "
    "and in greedy decoding; nats: divergence from the parent, per token; gain: expected speed-up, "
    "with k tokens proposed"
)


def _expected(found: Speculation) -> str:
    return f"{found.speedup:.2f} x with {found.k} proposed"


def _short(found: Speculation) -> str:
    return f"{found.speedup:.2f} x ({found.k})"


@dataclass(frozen=True, repr=False)
class DraftPlanResult(FitPlanResult):
    """What the making of a draft would try.

    Attributes:
        heads: numbers of tokens that a head over frequent tokens may have.
    """

    heads: tuple[int, ...] = ()

    def blocks(self) -> Sequence[Block]:
        """One table."""
        rows = [
            ("weight files of the parent", binary_size(self.file_bytes)),
            ("linear layers", f"{self.linears:,}"),
            ("formats of each", self.shown_formats),
            ("tokens of the head", ", ".join(f"{n:,}" for n in self.heads)),
            ("healing", f"{self.tokens_to_heal:,} tokens" if self.tokens_to_heal else "none"),
            ("time", "no limit" if self.minutes is None else f"{self.minutes:g} minutes"),
        ]
        return [Table.facts("plan of the draft", rows)]
