"""What `evaluate`, `bench` and `generate` return, and the demo, which calls them all."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from operator import attrgetter, itemgetter
from pathlib import Path
from typing import Any

from secateur.errors import RecipeError
from secateur.evaluation.speed import Speed
from secateur.models.samples import TEXTS
from secateur.reporting.models import CompressResult, PruneResult
from secateur.reporting.next_steps import command, generation
from secateur.reporting.tables import (
    Block,
    Columns,
    Line,
    Result,
    Table,
    binary_size,
    filled,
    next_steps,
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

    model = property(attrgetter("record.model"), doc="The name of the model.")
    texts = property(attrgetter("record.perplexity"), doc="The perplexity on each text.")
    divergence = property(
        attrgetter("record.divergence"), doc="The distance from the dense model on each text."
    )
    tasks = property(attrgetter("record.tasks"), doc="The scores of the tasks.")
    generation = property(attrgetter("record.generation"), doc="The texts that the model wrote.")

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

    perplexity = property(attrgetter("only.perplexity"), doc="exp(mean loss) on the only text.")
    mean_loss = property(attrgetter("only.mean_loss"), doc="Nats per token on the only text.")
    standard_error = property(attrgetter("only.standard_error"), doc="Of the mean loss.")
    protocol = property(attrgetter("only.protocol"), doc="What the perplexity depends on.")
    protocol_id = property(
        attrgetter("only.protocol_id"), doc="Perplexities with the same id can be compared."
    )

    def to_json(self) -> dict[str, Any]:
        """The record, as `evaluation.json` stores it."""
        return self.record.to_json()

    def blocks(self) -> Sequence[Block]:
        """Tables of results, then their protocols."""
        record = self.record
        written = [one for one in record.divergence if "kind" in one.protocol]
        tables = [
            Table.of_records(self.model, record.perplexity, PERPLEXITY),
            *(_distance(one) for one in record.divergence if one not in written),
            Table.of_records("on texts that the dense model wrote", written, KINDS),
            Table.of_records("tasks", record.tasks, TASKS, mark=_mark, kept=_retention),
            *map(_texts, record.generation),
        ]
        lines = [*(Line(filled(REPEATED, one) or "") for one in record.generation)]
        if any(one.reference for one in record.tasks):
            lines.append(Line(RETENTION, "dim"))
        protocols = {one.protocol_id: one.protocol for one in record.results}
        rows = [(key, ", ".join(f"{k} {v}" for k, v in p.items())) for key, p in protocols.items()]
        shown: list[Block] = [table for table in tables if table.rows]
        return [*shown, *lines, Table.of("protocols", ("id", "what it is"), rows, numbers=2)]


PERPLEXITY = Columns(
    "text | perplexity | dense | nats per token | protocol",
    "{text} | {perplexity:.4f} | {reference_perplexity:.4f} | "
    "{mean_loss:.4f}< ± {standard_error:.4f}> | {protocol_id}",
)
KINDS = Columns(
    "kind of text | same token most likely | accepted as a draft | KL, nats per token | tokens | "
    "protocol",
    "{protocol[kind]} | {top1_agreement:.4f}< ± {top1_standard_error:.4f}> | "
    "{acceptance:.4f}< ± {acceptance_standard_error:.4f}> | {kl:.4f}< ± {kl_standard_error:.4f}> | "
    "{tokens} | {protocol_id}",
)
TASKS = Columns(
    "task | metric | score | chance | items | shots | dense | difference | retention | protocol",
    "{task} | {metric} | {value:.3f}< ± {standard_error:.3f}> | {chance:.3f} | {items} | {shots} | "
    "{reference_value:.3f} | {difference:+.3f}< ± {difference_standard_error:.3f}>< {mark}> | "
    "{kept} | {protocol_id}",
    numbers=2,
)
TEXTS_OF = Columns(
    "prompt | text | dense | repeated",
    "{prompt} | {text:lines} | {reference_text:lines} | {repetition:.0%}< {degenerate}>",
    numbers=3,
)
"""Columns and rows of the tables."""

DISTANCE = """
    KL(dense ‖ model), nats per token | {kl:.4f}< ± {kl_standard_error:.4f}>
    same token most likely | {top1_agreement:.4f}< ± {top1_standard_error:.4f}>
    accepted as a draft, at temperature 1 | {acceptance:.4f}< ± {acceptance_standard_error:.4f}>
    change of loss, nats per token | {loss_change:.4f}< ± {loss_change_standard_error:.4f}>
"""
REPEATED = (
    "repeated 4-grams: {repetition:.0%}, degenerate texts: {degenerate}"
    "<; dense: {reference_repetition:.0%}, {reference_degenerate}>"
)
RETENTION = (
    "* significant at 95 % over pairs of items, n.s. not significant. Retention is the part of "
    "dense's lead over chance that is left; no lead: dense is less than two standard errors above "
    "chance."
)


def _distance(found: DivergenceRecord) -> Table:
    """Distance from the dense model."""
    title = f"distance from {found.reference} on {found.text} ({found.protocol_id})"
    return Table.about(title, DISTANCE, found)


def _mark(task: TaskRecord) -> str:
    return {None: "", True: "*", False: "n.s."}[task.significant]


def _retention(task: TaskRecord) -> str | None:
    return filled("{retention:.0%}", task) or ("no lead" if task.reference else None)


def _texts(found: GenerationRecord) -> Table:
    """Texts side by side."""
    title = f"texts ({found.protocol_id})"
    flag = {"degenerate": lambda x: "degenerate" * x.degenerate}
    return Table.of_records(title, found.samples, TEXTS_OF, **flag)


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
    def exit_code(self) -> int:
        """1 if no contender could run."""
        return int(all(speed.failure is not None for speed in self.speeds))

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
    ran = [x for x in found.contenders if x.failure is None]
    milliseconds = {"first": lambda x: 1e3 * x.first_token_seconds}
    lines = (filled(SIZES, found), found.verdict, filled(TIMED, found.protocol))
    failures: dict[str, list[str]] = {}
    for x in found.contenders:
        if x.failure is not None:
            failures.setdefault(x.failure, []).append(x.contender)
    return [
        Table.of_records(found.model, ran, TIMES, **milliseconds),
        *(Line(f"{', '.join(names)} could not run: {why}") for why, names in failures.items()),
        *(Line(line) for line in lines if line),
    ]


TIMES = Columns(
    " | tokens/s | least to most | first token | prompt tokens/s | memory",
    "{contender} | {tokens_per_second:.1f} | {tokens_per_second_least:.1f} to "
    "{tokens_per_second_most:.1f} | {first:.0f} ms | {prompt_tokens_per_second:.0f} | "
    "{resident_bytes:size}",
)
SIZES = "weight files {file_bytes:size}; dense bfloat16 would be {dense_bytes:size}"
TIMED = (
    "{cpu}, {threads} threads, kernels {kernels}; batch 1, prompt of {prompt_tokens} tokens, "
    "{new_tokens} new ones, medians of {rounds} rounds in turns"
)


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
        title = "decoding with a draft (T: temperature; taken: proposed tokens)"
        own: dict[str, Callable[[DraftedSpeed], Any]] = {
            "alone": lambda x: x.tokens / x.alone_seconds,
            "drafted": lambda x: x.tokens / x.drafted_seconds,
            "taken": lambda x: x.accepted / x.proposed if x.proposed else None,
            "call": lambda x: x.tokens / x.calls,
            "equal": lambda x: {None: "", True: "yes", False: "NO"}[x.equal],
        }
        return [Table.of_records(title, self.speeds, DRAFTED, **own), Line(self.verdict)]


DRAFTED = Columns(
    "text | T | tokens/s | with draft | times | taken | tokens a call | same text",
    "{kind} | {temperature:g} | {alone:.1f} | {drafted:.1f} | {speedup:.2f} | {taken:.0%} | "
    "{call:.2f} | {equal}",
)


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
        texts = {"dense": first.reference_text or "", "pruned": first.text}
        written = [
            Line(f"{name} writes: {without_blank_lines(first.prompt + text)}")
            for name, text in texts.items()
        ]
        columns = ("", "dense, bfloat16", "dense, int8", "pruned, int8")
        return [Table.of(self.model, columns, self.rows()), *written, *self.places()]

    def rows(self) -> list[tuple[str, ...]]:
        """The measurements of the dense model, of its int8 weights, and of the pruned model."""
        [text], packed, manifest = self.judged.texts, self.pruned.compression, self.pruned.manifest
        assert packed is not None
        assert manifest is not None
        rates = {s.name: s.tokens_per_second for s in self.bench.speeds if s.failure is None}
        speeds = (rates.get(name) for name in ("dense bf16", "dense int8", "packed"))
        sizes = (packed.bfloat16_bytes, self.rounded.file_bytes, packed.file_bytes)
        perplexities = (text.reference_perplexity, self.rounded_judged.perplexity, text.perplexity)
        return [
            ("weight files", *map(binary_size, sizes)),
            ("tokens per second, our kernels", *(f"{x:.0f}" if x else "" for x in speeds)),
            ("perplexity", *(f"{number:.2f}" for number in perplexities)),
            ("zeros in decoder matrices", "", "", f"{packed.sparsity:.2%}"),
            ("time to prune", "", "", f"{manifest.cost.seconds:.0f} s"),
            ("peak memory", "", "", binary_size(manifest.cost.peak_resident_bytes)),
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
