"""What `evaluate`, `bench` and `generate` return, and the demo, which calls them all."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from operator import itemgetter
from pathlib import Path
from typing import Any

from secateur.errors import RecipeError
from secateur.evaluation.speed import Speed
from secateur.models.hub import TEXTS
from secateur.reporting.models import CompressResult, PruneResult
from secateur.reporting.next_steps import command, generation
from secateur.reporting.tables import (
    Block,
    Line,
    Result,
    Table,
    binary_size,
    next_steps,
    with_error,
    without_blank_lines,
)
from secateur.runs.records.measured import (
    Bench,
    DivergenceRecord,
    EvaluationRecord,
    GenerationRecord,
    PerplexityRecord,
    TaskRecord,
)


@dataclass(frozen=True, repr=False)
class EvaluateResult(Result):
    """The measurements of a model, each number with its protocol.

    `perplexity`, `mean_loss`, `standard_error`, `protocol` and `protocol_id` need an evaluation on
    exactly one text. For several texts, `texts` has them for each.

    Attributes:
        record: all results, in the schema of `secateur/evaluation.json`.
    """

    record: EvaluationRecord

    @property
    def model(self) -> str:
        """The name of the model."""
        return self.record.model

    @property
    def texts(self) -> Sequence[PerplexityRecord]:
        """The perplexity on each text."""
        return self.record.perplexity

    @property
    def divergence(self) -> Sequence[DivergenceRecord]:
        """The distance from the dense model on each text; empty without a dense model."""
        return self.record.divergence

    @property
    def tasks(self) -> Sequence[TaskRecord]:
        """The scores of the tasks."""
        return self.record.tasks

    @property
    def generation(self) -> Sequence[GenerationRecord]:
        """The texts that the model generated."""
        return self.record.generation

    @property
    def only(self) -> PerplexityRecord:
        """The result on the only text.

        Raises:
            RecipeError: perplexity was measured on no text or on several texts.
        """
        if len(self.texts) != 1:
            raise RecipeError(
                f"perplexity was measured on {len(self.texts)} texts, not on one",
                remedy="read .texts: it has one result for each text",
            )
        return self.texts[0]

    @property
    def perplexity(self) -> float:
        """exp(mean loss) on the only text."""
        return self.only.perplexity

    @property
    def mean_loss(self) -> float:
        """Nats per token on the only text."""
        return self.only.mean_loss

    @property
    def standard_error(self) -> float | None:
        """Standard error of the mean loss, over windows; None for one window."""
        return self.only.standard_error

    @property
    def protocol(self) -> dict[str, Any]:
        """Everything that the perplexity depends on besides the model."""
        return self.only.protocol

    @property
    def protocol_id(self) -> str:
        """The id of the protocol. Perplexities with the same id can be compared."""
        return self.only.protocol_id

    def to_json(self) -> dict[str, Any]:
        """The record, as `evaluation.json` stores it."""
        return self.record.to_json()

    def blocks(self) -> Sequence[Block]:
        """Tables of results, then their protocols."""
        found: list[Block] = []
        if self.texts:
            perplexities = [
                {
                    "text": one.text,
                    "perplexity": f"{one.perplexity:.4f}",
                    "dense": _number(one.reference_perplexity, ".4f"),
                    "nats per token": with_error(one.mean_loss, one.standard_error),
                    "protocol": one.protocol_id,
                }
                for one in self.texts
            ]
            found.append(Table.of_records(self.model, perplexities))
        found += [_divergence_table(one) for one in self.divergence if "kind" not in one.protocol]
        found += _kinds_table([one for one in self.divergence if "kind" in one.protocol])
        if self.tasks:
            found += _task_blocks(self.tasks)
        for one in self.generation:
            found += _generation_blocks(one)
        protocols = {one.protocol_id: one.protocol for one in self.record.results}
        rows = [(key, ", ".join(f"{k} {v}" for k, v in p.items())) for key, p in protocols.items()]
        return [*found, Table.of("protocols", ("id", "what it is"), rows, numbers=2)]


def _divergence_table(found: DivergenceRecord) -> Table:
    """Distance from the dense model."""
    changed = with_error(found.loss_change, found.loss_change_standard_error)
    rows = [
        ("KL(dense ‖ model), nats per token", with_error(found.kl, found.kl_standard_error)),
        ("same token most likely", with_error(found.top1_agreement, found.top1_standard_error)),
        ("accepted as a draft, at temperature 1", _accepted(found)),
        ("change of loss, nats per token", changed),
    ]
    title = f"distance from {found.reference} on {found.text} ({found.protocol_id})"
    return Table.of(title, ("", ""), rows)


def _kinds_table(found: Sequence[DivergenceRecord]) -> list[Block]:
    """Distance from the dense model by kind of text, on texts of its own."""
    if not found:
        return []
    rows = [
        {
            "kind of text": one.protocol["kind"],
            "same token most likely": with_error(one.top1_agreement, one.top1_standard_error),
            "accepted as a draft": _accepted(one),
            "KL, nats per token": with_error(one.kl, one.kl_standard_error),
            "tokens": str(one.tokens),
            "protocol": one.protocol_id,
        }
        for one in found
    ]
    title = f"on texts that {found[0].reference} wrote at temperature 1"
    return [Table.of_records(title, rows)]


def _accepted(found: DivergenceRecord) -> str:
    """The acceptance with its error."""
    if found.acceptance is None:
        return "not measured"
    return with_error(found.acceptance, found.acceptance_standard_error)


def _task_blocks(tasks: Sequence[TaskRecord]) -> list[Block]:
    """Scores, with the score of guessing, so that nobody takes noise for quality."""
    table = Table.of_records("tasks", [_task_row(one) for one in tasks], numbers=2)
    if not any(one.reference for one in tasks):
        return [table]
    note = (
        "* significant at 95 % over pairs of items, n.s. not significant. Retention is the "
        "part of dense's lead over chance that is left; no lead: dense is less than two "
        "standard errors above chance."
    )
    return [table, Line(note, style="dim")]


def _task_row(one: TaskRecord) -> dict[str, str | None]:
    """The score on one task, and its difference from the dense model's."""
    difference, retention = None, None
    if one.reference is not None:
        mark = {None: "", True: " *", False: " n.s."}[one.significant]
        difference = with_error(one.difference or 0.0, one.difference_standard_error, "+.3f") + mark
        retention = "no lead" if one.retention is None else f"{one.retention:.0%}"
    return {
        "task": one.task,
        "metric": one.metric,
        "score": with_error(one.value, one.standard_error, ".3f"),
        "chance": f"{one.chance:.3f}",
        "items": str(one.items),
        "shots": str(one.shots),
        "dense": _number(one.reference_value, ".3f"),
        "difference": difference,
        "retention": retention,
        "protocol": one.protocol_id,
    }


def _generation_blocks(found: GenerationRecord) -> list[Block]:
    """Texts side by side, then their repetition."""
    rows = [
        {
            "prompt": one.prompt,
            "text": without_blank_lines(one.text),
            "dense": without_blank_lines(one.reference_text or "") if found.reference else None,
            "repeated": f"{one.repetition:.0%}" + " degenerate" * one.degenerate,
        }
        for one in found.samples
    ]
    summary = f"repeated 4-grams: {found.repetition:.0%}, degenerate texts: {found.degenerate}"
    if found.reference_repetition is not None:
        summary += f"; dense: {found.reference_repetition:.0%}, {found.reference_degenerate}"
    title = f"texts ({found.protocol_id})"
    numbers = 3 if found.reference else 2
    return [Table.of_records(title, rows, numbers), Line(summary)]


def _number(value: float | None, form: str) -> str | None:
    return None if value is None else f"{value:{form}}"


GAIN = 1.02
"""Smallest ratio of tokens per second that counts as faster."""


def fastest_other(rates: Mapping[str, float]) -> tuple[str, float] | None:
    """The fastest contender that is not packed, and its rate; None if `packed` has no other."""
    others = {name: rate for name, rate in rates.items() if not name.startswith("packed")}
    return max(others.items(), key=itemgetter(1)) if others and "packed" in rates else None


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

    @property
    def verdict(self) -> str:
        """A sentence: how much faster the packed model is than the fastest of all others."""
        ran = {s.name: s.tokens_per_second for s in self.speeds if s.failure is None}
        found = fastest_other(ran)
        if found is None and not self.compressed:
            return (
                "the model is not compressed, so its zeros are multiplied: "
                f"secateur compress {shlex.quote(self.model)} --output SMALL"
            )
        if found is None:
            return "nothing to compare: the packed model or all others could not run"
        best, rate = found
        ratio = ran["packed"] / rate
        if ratio < GAIN:
            return f"no gain: {best} is as fast or faster ({1 / ratio:.2f} times)"
        return f"{ratio:.2f} times as fast as {best}, the fastest of the others"

    @property
    def failed(self) -> bool:
        """Whether no contender could run."""
        return all(speed.failure is not None for speed in self.speeds)

    @property
    def failures(self) -> dict[str, list[str]]:
        """The contenders that could not run, grouped by reason."""
        found: dict[str, list[str]] = {}
        for speed in self.speeds:
            if speed.failure is not None:
                found.setdefault(speed.failure, []).append(speed.name)
        return found

    @property
    def record(self) -> Bench:
        """The record of the measurements."""
        prompt = self.protocol["prompt_tokens"]
        return Bench(
            schema_name="secateur.bench/1",
            model=self.model,
            contenders=tuple(speed.record(prompt) for speed in self.speeds),
            file_bytes=self.file_bytes,
            dense_bytes=self.dense_bytes,
            verdict=self.verdict,
            protocol=self.protocol,
        )

    def to_json(self) -> dict[str, Any]:
        """All measurements."""
        return {key: x for key, x in self.record.to_json().items() if key != "schema"}

    def blocks(self) -> Sequence[Block]:
        """The tables about its record."""
        return bench_blocks(self.record)


def bench_blocks(found: Bench) -> list[Block]:
    """A row for each contender that ran, then sizes, verdict and protocol."""
    p = found.protocol
    rows = [
        (
            x.contender,
            f"{x.tokens_per_second:.1f}",
            f"{x.tokens_per_second_least:.1f} to {x.tokens_per_second_most:.1f}",
            f"{1e3 * (x.first_token_seconds or 0):.0f} ms",
            f"{x.prompt_tokens_per_second:.0f}",
            binary_size(x.resident_bytes or 0),
        )
        for x in found.contenders
        if x.failure is None
    ]
    columns = ("", "tokens/s", "least to most", "first token", "prompt tokens/s", "memory")
    lines = (
        f"weight files {binary_size(found.file_bytes)}; dense bfloat16 would be "
        f"{binary_size(found.dense_bytes)}",
        found.verdict,
        f"{p['cpu']}, {p['threads']} threads, kernels {p['kernels']}; batch 1, prompt of "
        f"{p['prompt_tokens']} tokens, {p['new_tokens']} new ones, medians of "
        f"{p['rounds']} rounds in turns",
    )
    return [Table.of(found.model, columns, rows), *map(Line, lines)]


@dataclass(frozen=True)
class DraftedSpeed:
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


@dataclass(frozen=True, repr=False)
class DraftedBenchResult(Result):
    """The speed of a model with a draft and without, on texts of several kinds.

    Attributes:
        model: the name from the user.
        draft: the name of the draft from the user.
        speeds: a measurement for each kind of text and temperature.
        protocol: how and on which machine it was measured.
    """

    model: str
    draft: str
    speeds: tuple[DraftedSpeed, ...]
    protocol: dict[str, Any]

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
        speeds = [{**asdict(speed), "speedup": speed.speedup} for speed in self.speeds]
        found = {"model": self.model, "draft": self.draft, "speeds": speeds}
        return {**found, "verdict": self.verdict, "protocol": self.protocol}

    def blocks(self) -> Sequence[Block]:
        """A row for each kind and temperature, then the verdict."""
        rows = [
            (
                x.kind,
                f"{x.temperature:g}",
                f"{x.tokens / x.alone_seconds:.1f}",
                f"{x.tokens / x.drafted_seconds:.1f}",
                f"{x.speedup:.2f}",
                f"{x.accepted / x.proposed:.0%}" if x.proposed else "",
                f"{x.tokens / x.calls:.2f}",
                {None: "", True: "yes", False: "NO"}[x.equal],
            )
            for x in self.speeds
        ]
        heads = ("text", "T", "tokens/s", "with draft", "times", "taken", "tokens a call",
                 "same text")  # fmt: skip
        title = "decoding with a draft (T: temperature; taken: proposed tokens)"
        return [Table.of(title, heads, rows), Line(self.verdict)]


@dataclass(frozen=True, repr=False)
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
        rate = "" if self.tokens_per_second is None else f", {self.tokens_per_second:.1f} tokens/s"
        text = f"{self.tokens} tokens{rate} ({self.loop})"
        if self.proposed is not None:
            text += f", {self.accepted} of {self.proposed} drafted tokens accepted"
        if self.tokens == 0 and self.chat:
            text += (
                "\nThe model ends its answer at once, as a pruned one does that has forgotten the "
                "chat format. --no-chat continues the prompt as it is; or train on chats"
            )
        return text

    def blocks(self) -> Sequence[Block]:
        """The text, after its prompt unless it answers a message; then the account."""
        text = self.text if self.chat else self.prompt + self.text
        return [Line(text), Line(self.account, style="dim")]


@dataclass(frozen=True, repr=False)
class DemoResult(Result):
    """A model that was pruned, packed, timed and evaluated.

    Attributes:
        model: the name of the dense model.
        pruned: the result of `prune`; it contains the result of `compress`.
        bench: the result of `bench`.
        judged: the result of `evaluate`, on one text and some prompts.
        rounded: the result of `compress` for the dense model in int8.
        rounded_judged: the result of `evaluate` for it, on the same text.
        page: the report.
    """

    model: str
    pruned: PruneResult
    bench: BenchResult
    judged: EvaluateResult
    rounded: CompressResult
    rounded_judged: EvaluateResult
    page: Path

    def to_json(self) -> dict[str, Any]:
        """All numbers, by verb."""
        return {
            "report": str(self.page),
            "prune": self.pruned.to_json(),
            "bench": self.bench.to_json(),
            "evaluation": self.judged.to_json(),
            "dense_int8": {
                "compress": self.rounded.to_json(),
                "evaluation": self.rounded_judged.to_json(),
            },
        }

    def blocks(self) -> Sequence[Block]:
        """Size, speed, quality and texts next to the dense model's, and where the files are."""
        first = self.judged.generation[0].samples[0]
        dense, pruned = (
            without_blank_lines(first.prompt + (text or ""))
            for text in (first.reference_text, first.text)
        )
        columns = ("", "dense, bfloat16", "dense, int8", "pruned, int8")
        written = ("", f"dense writes:  {dense}", "", f"pruned writes: {pruned}")
        return [Table.of(self.model, columns, self.rows()), *map(Line, written), *self.places()]

    def rows(self) -> list[tuple[str, ...]]:
        """The measurements of the dense model, of its int8 weights, and of the pruned model."""
        [text], packed = self.judged.texts, self.pruned.compression
        assert packed is not None
        assert self.pruned.manifest is not None
        cost = self.pruned.manifest.cost
        rates = {s.name: s.tokens_per_second for s in self.bench.speeds if s.failure is None}
        speeds = (
            f"{rates[name]:.0f}" if name in rates else "not measured"
            for name in ("dense bf16", "dense int8", "packed")
        )
        sizes = (packed.bfloat16_bytes, self.rounded.file_bytes, packed.file_bytes)
        rounded = self.rounded_judged.perplexity
        perplexities = (text.reference_perplexity, rounded, text.perplexity)
        return [
            ("weight files", *map(binary_size, sizes)),
            ("tokens per second, our kernels", *speeds),
            ("perplexity", *(f"{number:.2f}" for number in perplexities)),
            ("zeros in decoder matrices", "", "", f"{packed.sparsity:.2%}"),
            ("time to prune", "", "", f"{cost.seconds:.0f} s"),
            ("peak memory", "", "", binary_size(cost.peak_resident_bytes)),
        ]

    def places(self) -> list[Block]:
        """Where the files are, and what to try next."""
        folder = self.pruned.output
        assert folder is not None
        own = ("prune", "MODEL", "--sparsity", "0.5", "--calibration", TEXTS[0])
        return next_steps(
            {
                "the packed model": folder,
                "its card": folder / "README.md",
                "the report": self.page.resolve(),
            },
            {
                **generation(folder),
                "time it in more ways": command("bench", folder),
                "see what pruning your own model needs": command(*own, "--dry-run"),
                "prune your own model, a folder or a hub id": command(
                    *own, "--compress", "int8", "--output", "MODEL-pruned"
                ),
            },
        )
