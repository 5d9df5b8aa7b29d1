"""What `draft` returns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from secateur.evaluation.acceptance import too_fast
from secateur.reporting.fit import STORED, FittedResult
from secateur.reporting.next_steps import after_a_draft
from secateur.reporting.plan import FitPlanResult
from secateur.reporting.tables import Block, Columns, Line, Table, binary_size
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
        first, whole = self.parent_seconds[0], self.head_tokens == self.vocabulary
        head = "all tokens" if whole else f"{self.head_tokens:,} of {self.vocabulary:,} tokens"
        facts = {**self.stored, "cost": self.cost, "first": 1e3 * first, "head": head}
        taken = {"before healing": self.unhealed, "the draft": self.acceptance}
        share: dict[str, Any] = {"cost": lambda x: x.seconds / first}
        time = {"time": lambda x: 1e3 * x[1], "share": lambda x: x[1] / first}
        calls, accepted = enumerate(self.parent_seconds, 1), (x for x in taken.items() if x[1])
        healed = {"healing": lambda x: "healed" if x.healed else None}
        on_text = "drafts that were made, on the text that chose"
        searched = [
            Table.of_records(on_text, self.candidates, CANDIDATES, **share, **healed),
            Table.of_records("heads over frequent tokens", self.heads, HEADS, **share),
            Table.of_records("predicted for other drafts", self.frontier, POINTS, **share),
        ]
        return [
            Table.about("the draft", FACTS + STORED, facts),
            Table.of_records("tokens that the parent takes", accepted, ACCEPTED),
            Table.of_records("one call of the parent", calls, CALLS, **time),
            Line(EXPLAINED, "dim"),
            *(table for table in searched if table.rows),
            *self.left_out,
            *(Line(fault, "bold red") for fault in self.broken),
            *after_a_draft(self.output, self.parent, pays=not self.broken),
        ]


FACTS = """
    expected speed-up, temperature 1 | {sampled.speedup:.2f} x with {sampled.k} proposed
    expected speed-up, greedy | {greedy.speedup:.2f} x with {greedy.k} proposed
    a token of the draft | {cost:.2f} of one of the parent
    one token of the parent | {first:.2f} ms
    weight files | {packed.file_bytes:size}
    head | {head}
"""
ACCEPTED = Columns(
    " | temperature 1 | greedy",
    "{0[0]} | {0[1].mean:.3f}< ± {0[1].standard_error:.3f}> | "
    "{0[1].agreement:.3f}< ± {0[1].agreement_standard_error:.3f}>",
)
CALLS = Columns("tokens | time | of one token", "{0[0]} | {time:.2f} ms | {share:.2f}", 0)
CANDIDATES = Columns(
    " | cost | taken | taken, greedy | nats | gain (k) | greedy (k)",
    "{name}<, {healing}> | {cost:.2f} | {acceptance.mean:.3f} | {acceptance.agreement:.3f} | "
    "{divergence:.4f} | {sampled.speedup:.2f} x ({sampled.k}) | "
    "{greedy.speedup:.2f} x ({greedy.k})",
)
HEADS = Columns(
    "tokens | cost | taken | taken, greedy | gain",
    "{tokens:,} | {cost:.2f} | {acceptance.mean:.3f} | {acceptance.agreement:.3f} | {gain:.2f} x",
    0,
)
POINTS = Columns(
    "cost | taken | nats | gain (k)",
    "{cost:.2f} | {acceptance:.3f} | {divergence:.4f} | {expected.speedup:.2f} x ({expected.k})",
    0,
)
EXPLAINED = (
    "cost: time of a token, over one of the parent; taken: tokens of the draft, at temperature 1 "
    "and in greedy decoding; nats: divergence from the parent, per token; gain: expected speed-up, "
    "with k tokens proposed"
)


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
            *self.search(),
            ("tokens of the head", ", ".join(f"{n:,}" for n in self.heads)),
        ]
        return [Table.facts("plan of the draft", rows)]
