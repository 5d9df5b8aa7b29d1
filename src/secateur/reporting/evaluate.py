"""What `evaluate`, `bench` and `generate` return."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from operator import itemgetter
from typing import Any, ClassVar

from secateur.errors import RecipeError
from secateur.evaluation.speed import Speed
from secateur.reporting.fields import Result, blocks_of, filled, of_record
from secateur.reporting.tables import Block
from secateur.runs.measured import Bench, EvaluationRecord, PerplexityRecord, TaskRecord
from secateur.runs.records import Record


def evaluation(found: EvaluationRecord) -> list[Block]:
    """Tables of results, then their protocols."""
    written = [one for one in found.divergence if "kind" in one.protocol]
    protocols = {one.protocol_id: one.protocol for one in found.results}
    return blocks_of(
        "EvaluationRecord",
        found,
        distances=[one for one in found.divergence if one not in written],
        written=written,
        scores=[*map(_score, found.tasks)],
        star="*" if any(one.reference for one in found.tasks) else None,
        protocols=[
            (key, ", ".join(f"{name} {value}" for name, value in protocol.items()))
            for key, protocol in protocols.items()
        ],
    )


def _score(task: TaskRecord) -> dict[str, Any]:
    """A score, whether it differs from dense's, and what is left of dense's lead."""
    kept = filled("{retention:.0%}", task) or ("no lead" if task.reference else None)
    return {
        "of": task,
        "mark": {None: None, True: "*", False: "n.s."}[task.significant],
        "kept": kept,
    }


class EvaluateResult(Result):
    """The measurements of a model, each number with its protocol.

    `perplexity`, `mean_loss`, `standard_error`, `protocol` and `protocol_id` need an evaluation on
    exactly one text. For several texts, `texts` has them for each.

    Attributes:
        record: all results, in the schema of `secateur/evaluation.json`.
    """

    record: EvaluationRecord

    joined = "record"
    model: ClassVar[Any] = of_record("record.model", "The name of the model.")
    texts: ClassVar[Any] = of_record("record.perplexity", "The perplexity on each text.")
    divergence: ClassVar[Any] = of_record(
        "record.divergence", "The distance from the dense model on each text."
    )
    tasks: ClassVar[Any] = of_record("record.tasks", "The scores of the tasks.")
    generation: ClassVar[Any] = of_record("record.generation", "The texts that the model wrote.")

    @property
    def only(self) -> PerplexityRecord:
        """The result on the only text.

        Raises:
            RecipeError: perplexity was measured on no text or on several texts.
        """
        if len(self.record.perplexity) != 1:
            raise RecipeError(
                f"perplexity was measured on {len(self.texts)} texts, not on one",
                remedy="read .texts: it has one result for each text",
            )
        return self.record.perplexity[0]

    perplexity: ClassVar[Any] = of_record("only.perplexity", "exp(mean loss) on the only text.")
    mean_loss: ClassVar[Any] = of_record("only.mean_loss", "Nats per token on the only text.")
    standard_error: ClassVar[Any] = of_record("only.standard_error", "Of the mean loss.")
    protocol: ClassVar[Any] = of_record("only.protocol", "What the perplexity depends on.")
    protocol_id: ClassVar[Any] = of_record(
        "only.protocol_id", "Perplexities with the same id can be compared."
    )

    def tables(self) -> list[Block]:
        """The tables about its record."""
        return evaluation(self.record)


GAIN = 1.02
"""Smallest ratio of tokens per second that counts as faster."""


def fastest_other(rates: Mapping[str, float]) -> tuple[str, float] | None:
    """The fastest contender that is not packed, and its rate; None if `packed` has no other."""
    others = {name: rate for name, rate in rates.items() if not name.startswith("packed")}
    return max(others.items(), key=itemgetter(1)) if others and "packed" in rates else None


def timing(found: Bench) -> list[Block]:
    """A row for each contender that ran, then sizes, verdict and protocol."""
    failures: dict[str, list[str]] = {}
    for x in found.contenders:
        if x.failure is not None:
            failures.setdefault(x.failure, []).append(x.contender)
    ran = [x for x in found.contenders if x.failure is None]
    return blocks_of("Bench", found, ran=ran, failed=[*failures.items()])


class BenchResult(Result, Bench):
    """Speed and memory of a model, run in several ways: `bench.json`."""

    @classmethod
    def of(
        cls, model: str, speeds: Sequence[Speed], *, compressed: bool, protocol: dict[str, Any],
        **sizes: int,
    ) -> BenchResult:  # fmt: skip
        """Make the record.

        Args:
            model: the name from the user.
            speeds: one measurement per contender.
            compressed: whether the model has packed weights.
            protocol: how and on which machine it was measured.
            **sizes: `file_bytes` and `dense_bytes`.
        """
        contenders = tuple(speed.record(protocol["prompt_tokens"]) for speed in speeds)
        ran = {s.name: s.tokens_per_second for s in speeds if s.failure is None}
        return cls(
            schema_name="secateur.bench/1",
            model=model,
            contenders=contenders,
            verdict=_verdict(model, ran, compressed),
            protocol=protocol,
            **sizes,
        )

    @property
    def exit_code(self) -> int:
        """1 if no contender could run."""
        return int(all(one.failure is not None for one in self.contenders))

    def tables(self) -> list[Block]:
        """The tables about its record."""
        return timing(self)


def _verdict(model: str, ran: Mapping[str, float], compressed: bool) -> str:
    """A sentence: how much faster the packed model is than the fastest of all others."""
    found = fastest_other(ran)
    if found is None and not compressed:
        return (
            "the model is not compressed, so its zeros are multiplied: "
            f"secateur compress {shlex.quote(model)} --output SMALL"
        )
    if found is None:
        return "nothing to compare: the packed model or all others could not run"
    best, rate = found
    ratio = ran["packed"] / rate
    if ratio < GAIN:
        return f"no gain: {best} is as fast or faster ({1 / ratio:.2f} times)"
    return f"{ratio:.2f} times as fast as {best}, the fastest of the others"


class DraftedSpeed(Record):
    """A model on texts of one kind, with a draft and without.

    Attributes:
        kind: of text: prose, code, chat or lists.
        temperature: 0 or 1.
        tokens: of all texts, after the first token of each.
        alone_seconds: without the draft.
        drafted_seconds: with it.
        calls: of the model, with the draft.
        proposed: tokens that the draft proposed.
        accepted: of these.
        equal: at temperature 0, whether all texts were the same; None at others.
    """

    kind: str
    temperature: float
    tokens: int
    alone_seconds: float
    drafted_seconds: float
    calls: int
    proposed: int
    accepted: int
    equal: bool | None

    @property
    def speedup(self) -> float:
        """How many times as fast as without the draft."""
        return self.alone_seconds / self.drafted_seconds


class DraftedBenchResult(Result):
    """The speed of a model with a draft and without, on texts of several kinds.

    Attributes:
        model: the name from the user.
        draft: the name of the draft from the user.
        expected: the speed-ups at temperature 0 and 1 that making the draft promised; None of a
            model that was not made as a draft.
        speeds: a measurement for each kind of text and temperature.
        protocol: how and on which machine it was measured.
    """

    model: str
    draft: str
    expected: tuple[float, float] | None
    speeds: tuple[DraftedSpeed, ...]
    protocol: dict[str, Any]

    @property
    def rates(self) -> list[dict[str, Any]]:
        """The measurements by token."""
        return [
            {
                "of": x,
                "alone": x.tokens / x.alone_seconds,
                "drafted": x.tokens / x.drafted_seconds,
                "expected": self.expected[x.temperature > 0] if self.expected else None,
                "taken": x.accepted / x.proposed if x.proposed else None,
                "call": x.tokens / x.calls,
                "equal": {None: None, True: "yes", False: "NO"}[x.equal],
            }
            for x in self.speeds
        ]

    def speedup(self, temperature: float) -> float:
        """Over all texts of a temperature."""
        own = [speed for speed in self.speeds if speed.temperature == temperature]
        return sum(x.alone_seconds for x in own) / sum(x.drafted_seconds for x in own)

    @property
    def verdict(self) -> str:
        """A sentence: what the draft brings."""
        most = max(self.speedup(0.0), self.speedup(1.0))
        if most < GAIN:
            return f"no gain: at best {most:.2f} times as fast as without the draft"
        return (
            f"{self.speedup(0.0):.2f} times as fast as without the draft at temperature 0, with "
            f"the same text; {self.speedup(1.0):.2f} times at temperature 1"
        )

    def to_json(self) -> dict[str, Any]:
        """All measurements."""
        speeds = [{**speed.to_json(), "speedup": speed.speedup} for speed in self.speeds]
        return {**super().to_json(), "speeds": speeds, "verdict": self.verdict}


class GenerateResult(Result):
    """A generated text, with speed and decode loop.

    Attributes:
        model: the name from the user.
        prompt: the prompt.
        text: the generated text.
        tokens: number of tokens in the text.
        load_seconds: time to load the model.
        first_token_seconds: time from the prompt to the first token.
        tokens_per_second: speed after the first token; None for a single token.
        loop: `fused decode loop`, one call into C for each token; or `transformers` and the reason.
        chat: whether the prompt was a message in the tokenizer's chat template.
        proposed: tokens that a draft has proposed; None without a draft.
        accepted: of these, those that are in the text.
    """

    model: str
    prompt: str
    text: str
    tokens: int
    load_seconds: float
    first_token_seconds: float | None
    tokens_per_second: float | None
    loop: str
    chat: bool = False
    proposed: int | None = None
    accepted: int | None = None

    @property
    def account(self) -> str:
        """Number of tokens, speed and decode loop; a line more if there is no answer."""
        rate = filled(", {tokens_per_second:.1f} tokens/s", self) or ""
        drafted = filled(", {accepted} of {proposed} drafted tokens accepted", self) or ""
        silent = (
            "\nThe model ends its answer at once, as a pruned one does that has forgotten the "
            "chat format. --no-chat continues the prompt as it is; or train on chats"
        ) * (self.chat and not self.tokens)
        return f"{self.tokens} tokens{rate} ({self.loop}){drafted}{silent}"

    @property
    def shown(self) -> str:
        """The text, after its prompt unless it answers a message."""
        return self.text if self.chat else self.prompt + self.text
