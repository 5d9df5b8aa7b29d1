"""What `evaluate` returns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from secateur.errors import RecipeError
from secateur.reporting.results.result import Result
from secateur.reporting.tables import Block, Line, Table, with_error
from secateur.reporting.wording import without_blank_lines
from secateur.runs.evaluation import (
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
        """The distance from the dense model on the first text; empty without a dense model."""
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
            found.append(perplexity_table(self.model, self.texts))
        found += [divergence_table(one) for one in self.divergence]
        if self.tasks:
            found += task_blocks(self.tasks)
        for one in self.generation:
            found += generation_blocks(one)
        protocols = {one.protocol_id: one.protocol for one in self.record.results}
        rows = [(key, ", ".join(f"{k} {v}" for k, v in p.items())) for key, p in protocols.items()]
        return [*found, Table.of("protocols", ("id", "what it is"), rows, numbers=2)]


def perplexity_table(model: str, texts: Sequence[PerplexityRecord]) -> Table:
    """Perplexity on each text, with the dense model's if it was measured."""
    beside = any(one.reference_perplexity is not None for one in texts)
    columns = ["text", "perplexity", "nats per token", "protocol"]
    if beside:
        columns.insert(2, "dense")
    rows = []
    for one in texts:
        row = [
            one.text,
            f"{one.perplexity:.4f}",
            with_error(one.mean_loss, one.standard_error),
            one.protocol_id,
        ]
        if beside:
            row.insert(2, number(one.reference_perplexity, ".4f"))
        rows.append(row)
    return Table.of(model, columns, rows)


def divergence_table(found: DivergenceRecord) -> Table:
    """Distance from the dense model."""
    rows = [
        ("KL(dense ‖ model), nats per token", with_error(found.kl, found.kl_standard_error)),
        ("same token most likely", with_error(found.top1_agreement, found.top1_standard_error)),
        (
            "change of loss, nats per token",
            with_error(found.loss_change, found.loss_change_standard_error),
        ),
    ]
    title = f"distance from {found.reference} on {found.text} ({found.protocol_id})"
    return Table.of(title, ("", ""), rows)


def task_blocks(tasks: Sequence[TaskRecord]) -> list[Block]:
    """Scores, with the score of guessing, so that nobody takes noise for quality."""
    beside = any(one.reference for one in tasks)
    columns = ["task", "metric", "score", "chance", "items", "shots"]
    if beside:
        columns += ["dense", "difference", "retention"]
    rows = [task_row(one, beside=beside) for one in tasks]
    table = Table.of("tasks", [*columns, "protocol"], rows, numbers=2)
    if not beside:
        return [table]
    return [
        table,
        Line(
            "* significant at 95 % over pairs of items, n.s. not significant. Retention is the "
            "part of dense's lead over chance that is left; no lead: dense is less than two "
            "standard errors above chance.",
            style="dim",
        ),
    ]


def task_row(one: TaskRecord, *, beside: bool) -> list[str]:
    """The score on one task; with `beside` also its difference from the dense model."""
    row = [
        one.task,
        one.metric,
        with_error(one.value, one.standard_error, ".3f"),
        f"{one.chance:.3f}",
        str(one.items),
        str(one.shots),
    ]
    if beside:
        mark = {None: "", True: " *", False: " n.s."}[one.significant]
        error = one.difference_standard_error
        row += [
            number(one.reference_value, ".3f"),
            with_error(one.difference or 0.0, error, "+.3f") + mark,
            "no lead" if one.retention is None else f"{one.retention:.0%}",
        ]
    return [*row, one.protocol_id]


def generation_blocks(found: GenerationRecord) -> list[Block]:
    """Texts side by side, then their repetition."""
    columns = ["prompt", "text", "repeated"]
    if found.reference:
        columns.insert(2, "dense")
    rows = []
    for one in found.samples:
        share = f"{one.repetition:.0%}" + (" degenerate" if one.degenerate else "")
        dense = [one.reference_text or ""] if found.reference else []
        rows.append([one.prompt, *map(without_blank_lines, [one.text, *dense]), share])
    summary = f"repeated 4-grams: {found.repetition:.0%}, degenerate texts: {found.degenerate}"
    if found.reference_repetition is not None:
        summary += f"; dense: {found.reference_repetition:.0%}, {found.reference_degenerate}"
    title = f"texts ({found.protocol_id})"
    return [Table.of(title, columns, rows, numbers=len(columns) - 1), Line(summary)]


def number(value: float | None, form: str) -> str:
    """A number as text; empty for None."""
    return "" if value is None else f"{value:{form}}"
