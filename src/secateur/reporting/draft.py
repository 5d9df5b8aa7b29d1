"""What `draft` returns."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from secateur.evaluation.acceptance import too_fast
from secateur.reporting.fit import FittedResult
from secateur.reporting.next_steps import PROMPT, command, conversion
from secateur.reporting.plan import FitPlanResult
from secateur.reporting.tables import Block, next_steps
from secateur.runs.measured import Acceptance, Speculation

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
    def head(self) -> str:
        """What the head can propose."""
        if self.head_tokens == self.vocabulary:
            return "all tokens"
        return f"{self.head_tokens:,} of {self.vocabulary:,} tokens"

    @property
    def taken(self) -> list[tuple[str, Acceptance]]:
        """What the parent takes, before and after healing."""
        found = ("before healing", self.unhealed), ("the draft", self.acceptance)
        return [(name, one) for name, one in found if one is not None]

    @property
    def calls(self) -> list[tuple[int, float, float]]:
        """The tokens of a call of the parent, its seconds, and those over c(1)."""
        first = self.parent_seconds[0]
        return [(n, one, one / first) for n, one in enumerate(self.parent_seconds, 1)]

    @property
    def costed(self) -> dict[str, list[dict[str, Any]]]:
        """What was searched, by the name of the field; each entry with its cost over c(1)."""
        first = self.parent_seconds[0]
        found: dict[str, tuple[Any, ...]] = {
            "candidates": self.candidates, "heads": self.heads, "frontier": self.frontier,
        }  # fmt: skip
        return {
            name: [{"of": x, "cost": x.seconds / first} for x in own] for name, own in found.items()
        }

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

    def following(self) -> list[Block]:
        """Where the files are, and the next commands."""
        notes, beside = self.output / "secateur", ("--draft", self.output)
        measuring = command("bench", self.parent, *beside)
        writing = command("generate", self.parent, *beside, "--prompt", PROMPT)
        places = {
            "the draft": self.output,
            "every candidate": notes / "draft.json",
            "the recipe": notes / "recipe.yaml",
        }
        if self.broken:
            return next_steps(places, {"measure how fast the model writes with it": measuring})
        used = {"let the model write faster": writing, "measure by how much": measuring}
        return next_steps(places, {**used, "give the draft to llama.cpp": conversion(self.output)})


class DraftPlanResult(FitPlanResult):
    """What the making of a draft would try.

    Attributes:
        heads: numbers of tokens that a head over frequent tokens may have.
    """

    heads: tuple[int, ...] = ()

    @property
    def shown_heads(self) -> list[str]:
        """The numbers as people write them."""
        return [f"{n:,}" for n in self.heads]
