"""What `fit` and `draft` return."""

from __future__ import annotations

import json
import math
import shlex
from abc import ABC, abstractmethod
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from secateur.evaluation.acceptance import too_fast
from secateur.reporting.charts import LineChart, Series
from secateur.reporting.fields import Result
from secateur.reporting.models import CompressResult
from secateur.reporting.next_steps import PROMPT, command, conversion, evaluation
from secateur.reporting.tables import Block, next_steps, plus_minus, signed
from secateur.runs.measured import Acceptance, Speculation
from secateur.runs.records import MustKeep


@dataclass(frozen=True)
class FitCost:
    """A kind of cost that the search counted.

    Attributes:
        name: size, memory or seconds.
        rest: of everything that is no linear: bytes, or seconds of a token.
        limit: the most of the whole model; None for no bound.
    """

    name: str
    rest: int | float
    limit: int | float | None


@dataclass(frozen=True)
class FitCheck:
    """A bound beside what was measured on the packed winner.

    Attributes:
        option: that bounds it, such as `max_size`.
        wanted: the bound: bytes, nats per token, or a factor.
        measured: in the same unit.
        kept: whether the bound holds. A speed-up may be 5 % lower: that is the error of measuring.
        failure: why nothing could be measured; None if it was.
        standard_error: of what was measured; None if it is not known.
    """

    option: str
    wanted: int | float
    measured: int | float
    kept: bool
    failure: str | None = None
    standard_error: float | None = None

    def format_value(self, value: float, *, nearest: bool = False) -> str:
        """A value in its unit; the nearest one that can be kept is rounded to that side."""
        if self.option in ("max_size", "max_inference_memory"):
            mebibytes = value / 2**20
            return f"{math.ceil(10 * mebibytes) / 10:.1f}MiB" if nearest else f"{mebibytes:.1f} MiB"
        # the nearest loss is one above, the nearest speed-up one below
        most = self.option == "max_loss_increase"
        digits, unit, side = (4, " nats", math.ceil) if most else (3, "", math.floor)
        shown = side(value * 10**digits) / 10**digits if nearest else value
        return f"{shown:.{digits}f}" + ("" if nearest else unit)

    @property
    def given(self) -> str:
        """The bound in its unit."""
        return self.format_value(self.wanted)

    @property
    def found(self) -> str:
        """What was measured, with its standard error."""
        return self.failure or self.format_value(self.measured) + plus_minus(self.standard_error)

    @property
    def flag(self) -> str:
        """The option on the command line."""
        return "--" + self.option.replace("_", "-")

    @property
    def said(self) -> str:
        """The sentence for a bound that is broken."""
        if self.failure is not None:
            return f"{self.flag} could not be measured: {self.failure}"
        return (
            f"{self.flag} is broken: {self.found} was measured, "
            f"{self.given} was given; the nearest that this model keeps is "
            f"{self.format_value(self.measured, nearest=True)}"
        )


@dataclass(frozen=True)
class FitLoss:
    """The winner on text that was used for nothing else.

    Attributes:
        file_bytes: of its weight files, at most.
        loss_increase: above the dense model, in nats per token, of the packed model as it runs.
        standard_error: of it, over windows; None for one window.
    """

    file_bytes: int
    loss_increase: float
    standard_error: float | None = None

    def __str__(self) -> str:
        return signed(self.loss_increase, 4) + plus_minus(self.standard_error)


@dataclass(frozen=True)
class FitLike:
    """The file whose types a fit took, beside the result, on text that did not choose.

    Attributes:
        file: its place.
        theirs: its divergence from the model, in nats per token.
        ours: the divergence of the result.
        kept: tensors with matrices of the model that the result has from the file, byte for byte.
        unchecked: tensors that were compared with nothing, and are the file's.
    """

    file: str
    theirs: float
    ours: float
    kept: tuple[str, ...] = ()
    unchecked: tuple[str, ...] = ()


@dataclass(frozen=True)
class FitFinalist:
    """A candidate that was made as a real model.

    Attributes:
        name: for people.
        file_bytes: of its weight files.
        predicted: its divergence, as it was predicted before it was made.
        divergence: its own before healing, in nats per token.
        healed: its own after healing; None if it was not healed, or was no better then.
        rise: of its loss on the windows that choose, plus the standard error, in nats per token;
            None where the loss has no bound.
    """

    name: str
    file_bytes: int
    predicted: float
    divergence: float
    healed: float | None = None
    rise: float | None = None

    @property
    def last(self) -> float:
        """Its divergence, after healing if it was healed."""
        return self.divergence if self.healed is None else self.healed


@dataclass(frozen=True)
class FitPoint:
    """What is predicted for a size.

    Attributes:
        name: of the formats that take part.
        file_bytes: of the weight files, at most.
        predicted: divergence from the dense model, in nats per token.
    """

    name: str
    file_bytes: int
    predicted: float


@dataclass(frozen=True)
class FitCorrection:
    """A winner that was slower than predicted, so that models were chosen again, by factors.

    Attributes:
        predicted: its speed-up by the table of timed matrices.
        measured: its speed-up when it was timed.
        aimed: the speed-up by the table that the next choice had to reach.
        reached: the speed-up of its winner when it was timed; None if it could not be.
    """

    predicted: float
    measured: float
    aimed: float
    reached: float | None


class FittedResult(Result, ABC):
    """A packed model whose formats a search has chosen.

    Attributes:
        output: folder of the packed model.
        seconds: wall time.
        dropped: what was left out to keep the time.
        kind_of: how each linear is stored, by its name.
        embeddings: the values of embedding and head.
        packed: sizes of what was written.
    """

    output: Path
    seconds: float
    dropped: tuple[str, ...]
    kind_of: dict[str, str]
    embeddings: str
    packed: CompressResult

    @property
    def linears(self) -> str:
        """How many linear layers are stored in each way."""
        kinds = Counter(self.kind_of.values()).most_common()
        return ", ".join(f"{n} {name}" for name, n in kinds)

    @property
    @abstractmethod
    def broken(self) -> list[str]:
        """What the result does not keep, a sentence for each; empty if all is well."""

    @property
    def exit_code(self) -> int:
        """3 if a bound is broken, or the result does not pay."""
        return 3 * bool(self.broken)


class FitResult(FittedResult):
    """The winner of a fit, and what it won against: `fit.json`.

    Attributes:
        winner: the best finalist.
        finalists: the candidates that were made and keep the bounds but that on the loss.
        frontier: what is predicted for some sizes, of all formats and of rounding alone.
        loss: of the winner, on the judged windows.
        costs: the kinds of cost, size first.
        checks: every bound beside what was measured.
        corrections: winners that were slower than predicted.
        types: of the tensors of the GGUF file, if one was made, by their names.
        like: the file whose types were taken, if any.
        must_keep: every bound of `--must-keep` beside what was measured.
    """

    winner: FitFinalist
    finalists: tuple[FitFinalist, ...]
    frontier: tuple[FitPoint, ...]
    loss: FitLoss
    costs: tuple[FitCost, ...]
    checks: tuple[FitCheck, ...]
    corrections: tuple[FitCorrection, ...]
    types: dict[str, str]
    like: FitLike | None
    must_keep: tuple[MustKeep, ...] = ()

    @property
    def tensors(self) -> str:
        """How many tensors of the GGUF file have each type."""
        return ", ".join(f"{n} {name}" for name, n in Counter(self.types.values()).most_common())

    @property
    def ranked(self) -> list[FitFinalist]:
        """The finalists, the best first."""
        return sorted(self.finalists, key=lambda one: one.last)

    def chart(self) -> LineChart:
        """Size against divergence: what is predicted, what was made, and the winner."""
        names = dict.fromkeys(point.name for point in self.frontier)
        predicted = {
            name: [(x.file_bytes, x.predicted) for x in self.frontier if x.name == name]
            for name in names
        }
        made = [(x.file_bytes, x.last) for x in self.finalists if x != self.winner]
        found = [
            *((f"predicted: {name}", points, True) for name, points in predicted.items()),
            ("made", made, False),
            ("the winner", [(self.winner.file_bytes, self.winner.last)], False),
        ]
        series = (
            Series(name, tuple((size / 2**20, nats) for size, nats in points), joined)
            for name, points, joined in found
            if points
        )
        return LineChart(
            "frontier",
            "Size against divergence from the dense model",
            "weight files, MiB",
            "nats per token",
            tuple(series),
            log_y=all(nats > 0 for _, points, _ in found for _, nats in points),
            note="Lower is better, and so is further left. Divergence on the windows that choose.",
        )

    @property
    def broken(self) -> list[str]:
        """Bounds that the measured result does not keep."""
        return [one.said for one in self.checks if not one.kept]

    def following(self) -> list[Block]:
        """Where the files are, and the next commands."""
        folder, notes = self.output, self.output / "secateur"
        file = min(folder.glob("*.gguf"), default=None)
        running = {"give it to llama.cpp": conversion(folder)}
        if file is not None:
            running = {"run it in llama.cpp": shlex.join(["llama-cli", "-m", str(file)])}
        return next_steps(
            {
                **({"the GGUF file": file} if file else {}),
                "the packed model": folder,
                "every candidate": notes / "fit.json",
                "the plot": notes / "frontier.png",
                "the recipe": notes / "recipe.yaml",
            },
            {
                "talk to it": command("chat", folder),
                "serve it": command("serve", folder),
                **evaluation(folder),
                "publish it, under your name on the hub": command("push", folder, "OWNER/NAME"),
                **running,
                "make it again": command("chain", notes / "recipe.yaml"),
            },
        )


DRAFT = "draft.json"
"""The record of a draft."""

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
class TriedHead:
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


class DraftedResult(Result):
    """What proposes tokens to a parent, and what it gains.

    Attributes:
        output: its folder.
        seconds: wall time.
        parent: the model that it proposes to.
        head_tokens: the tokens that its head can propose.
        vocabulary: the tokens of the parent.
        parent_seconds: c(1), c(2), …: seconds of one call of the parent with so many tokens.
        draft_seconds: of one token of the draft.
        acceptance: what the parent takes, on text that was used for nothing else.
        sampled: what the draft gains at temperature 1, by `acceptance`.
        greedy: what it gains in greedy decoding, by `acceptance`.
        heads: the heads that were tried.
    """

    output: Path
    seconds: float
    parent: str
    head_tokens: int
    vocabulary: int
    parent_seconds: tuple[float, ...]
    draft_seconds: float
    acceptance: Acceptance
    sampled: Speculation
    greedy: Speculation
    heads: tuple[TriedHead, ...]

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
    def calls(self) -> list[tuple[int, float, float]]:
        """The tokens of a call of the parent, its seconds, and those over c(1)."""
        first = self.parent_seconds[0]
        return [(n, one, one / first) for n, one in enumerate(self.parent_seconds, 1)]

    @property
    def places(self) -> list[tuple[int, float, float]]:
        """Each place of a chain, and how often the parent takes a token there."""
        pairs = [(1.0, 1.0), *zip(self.acceptance.runs, self.acceptance.greedy_runs, strict=True)]
        return [
            (place, *(now / before if before else 0.0 for now, before in zip(*both, strict=True)))
            for place, both in enumerate(zip(pairs[1:], pairs, strict=False), start=1)
        ]

    @property
    def chain(self) -> int:
        """How many proposed tokens bring most."""
        return max(self.sampled, self.greedy, key=lambda one: one.speedup).k

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
        best, k = max(self.sampled.speedup, self.greedy.speedup), max(self.chain, 1)
        if best >= LEAST_SPEEDUP:
            return []
        verify = self.parent_seconds[min(k, len(self.parent_seconds) - 1)] / self.parent_seconds[0]
        return [
            f"no draft pays here: the best one is expected to bring {best:.2f} x. The parent takes "
            f"{self.acceptance.mean:.0%} of its tokens ({self.acceptance.agreement:.0%} in greedy "
            f"decoding), a token of it costs {self.cost:.0%} of one of the parent, and the parent "
            f"reads {k + 1} tokens in {verify:.2f} times the time of one"
        ]

    @property
    def exit_code(self) -> int:
        """3 if the draft does not pay."""
        return 3 * bool(self.broken)

    @property
    def engines(self) -> dict[str, str]:
        """The command of each engine besides ours that uses the draft."""
        return {"give the draft to llama.cpp": conversion(self.output)}

    def following(self) -> list[Block]:
        """Where the files are, and the next commands."""
        notes, beside = self.output / "secateur", (self.parent, "--draft", self.output)
        places = {
            "the draft": self.output,
            "every candidate": notes / DRAFT,
            "the recipe": notes / "recipe.yaml",
        }
        writing = {"let the model write faster": command("generate", *beside, "--prompt", PROMPT)}
        measuring = {"measure how fast the model writes with it": command("bench", *beside)}
        used = {} if self.broken else writing | self.engines
        return next_steps(places, measuring | used)


class DraftResult(DraftedResult, FittedResult):
    """A draft, what it gains, and what it won against: `draft.json`.

    Attributes:
        unhealed: what the parent takes before healing, on text that was used for nothing else; None
            where nothing was healed.
        candidates: the drafts that were made, with their whole head.
        frontier: drafts that are predicted for other times of a token.
    """

    unhealed: Acceptance | None
    candidates: tuple[DraftCandidate, ...]
    frontier: tuple[DraftPoint, ...]


class HeadResult(DraftedResult):
    """A head that reads its parent's states: `draft.json`.

    Attributes:
        taps: after how many of the parent's layers it reads states.
        tokens: of the text that it has learned on.
        values: how its matrices are stored where it runs.
        formats: with how many tokens it gains most in each, and what.
    """

    taps: tuple[int, int, int]
    tokens: int
    values: str
    formats: dict[str, TriedHead]


class MTPResult(DraftedResult):
    """The model's own MTP layers as its draft: `draft.json`.

    Attributes:
        layers: how many there are.
        loop: why transformers computes the parent; empty where our own loop does.
    """

    layers: int
    loop: str

    @property
    def engines(self) -> dict[str, str]:
        """The command of each engine besides ours that uses the layers of the model itself."""
        name = Path(self.parent).name
        given = json.dumps({"method": "mtp", "num_speculative_tokens": self.chain})
        file = f"{name}.gguf --spec-type draft-mtp --spec-draft-n-max {self.chain}"
        return {
            "vLLM": shlex.join(["vllm", "serve", name, "--speculative-config", given]),
            "llama.cpp, for the model in GGUF with these layers": f"llama-server -m {file}",
        }
