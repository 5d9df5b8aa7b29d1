"""`secateur/evaluation.json`: what a model was judged to be, every number with its protocol.

`secateur evaluate` writes it and the report reads it. `docs/evaluation.md` documents it. One file
holds the results of several calls: a new result replaces an earlier one with the same protocol id,
and all others stay.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from secateur.errors import CheckpointError
from secateur.runs.atomic import write_json

__all__ = [
    "FILE_NAME",
    "SCHEMA",
    "DivergenceRecord",
    "EvaluationRecord",
    "GenerationRecord",
    "PerplexityRecord",
    "SampleRecord",
    "TaskRecord",
    "read_evaluation",
]

FILE_NAME = "evaluation.json"
"""Its name in the folder `secateur/` of a run."""

FIRST_SCHEMA = "secateur.evaluation/1"
"""One reference and environment for all results, one divergence, one set of texts."""

SCHEMA: Literal["secateur.evaluation/2"] = "secateur.evaluation/2"


class StrictRecord(BaseModel):
    """A part of the file. Keys that are unknown are faults: a typo must not pass as silence."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Measurement(StrictRecord):
    """What every result says beside its numbers.

    Attributes:
        protocol: everything the numbers depend on besides the model.
        protocol_id: its short name.
        reference: the dense model that the numbers are held against; None for none.
        environment: versions and hardware.
        inherited_from: the model that was measured, if it is another one with the same weights.
    """

    protocol: dict[str, Any]
    protocol_id: str
    reference: str | None
    environment: dict[str, Any]
    inherited_from: str | None = None

    @property
    def key(self) -> tuple[str, ...]:
        """The same for results of which the newer replaces the older."""
        return (self.protocol_id,)

    def after(self, earlier: Measurement) -> Measurement:
        """The result that stays where an earlier one has the same key: the newer.

        One without a reference keeps what the earlier one says of the reference, where that
        still holds.
        """
        if self.reference is not None or earlier.reference is None:
            return self
        kept = self.reference_numbers(earlier)
        return self.model_copy(update={**kept, "reference": earlier.reference}) if kept else self

    def reference_numbers(self, earlier: Any) -> Mapping[str, Any]:
        """The fields about the reference that hold beside this result; none if they do not."""
        return {}


class PerplexityRecord(Measurement):
    """Perplexity on one text; `reference_perplexity` is the dense model's on the same windows."""

    text: str
    perplexity: float
    mean_loss: float
    standard_error: float | None
    reference_perplexity: float | None
    seconds: float

    def reference_numbers(self, earlier: PerplexityRecord) -> Mapping[str, Any]:
        """The perplexity of the reference depends on the protocol alone."""
        return {"reference_perplexity": earlier.reference_perplexity}


class DivergenceRecord(Measurement):
    """Distance from the reference on a text, nats per token."""

    text: str
    kl: float
    kl_standard_error: float | None
    top1_agreement: float = Field(ge=0, le=1)
    top1_standard_error: float | None
    loss_change: float
    loss_change_standard_error: float | None
    tokens: int


class TaskRecord(Measurement):
    """One metric of one task; what comes after `shots` is null without a reference."""

    task: str
    metric: str
    value: float = Field(ge=0, le=1)
    standard_error: float | None
    chance: float = Field(ge=0, le=1)
    items: int = Field(ge=1)
    shots: int = Field(ge=0)
    reference_value: float | None
    difference: float | None
    difference_standard_error: float | None
    significant: bool | None
    retention: float | None

    @property
    def key(self) -> tuple[str, ...]:
        """Both metrics of a task have its protocol id."""
        return self.protocol_id, self.metric

    def reference_numbers(self, earlier: TaskRecord) -> Mapping[str, Any]:
        """The comparison in pairs holds if the score is what it was."""
        if self.value != earlier.value:
            return {}
        return {
            "reference_value": earlier.reference_value,
            "difference": earlier.difference,
            "difference_standard_error": earlier.difference_standard_error,
            "significant": earlier.significant,
            "retention": earlier.retention,
        }


class SampleRecord(StrictRecord):
    """A prompt, and what the model and the reference made of it."""

    prompt: str
    text: str
    reference_text: str | None
    repetition: float = Field(ge=0, le=1)
    reference_repetition: float | None
    degenerate: bool


class GenerationRecord(Measurement):
    """Texts; `repetition` is the mean of the samples, `degenerate` their count."""

    samples: list[SampleRecord]
    repetition: float
    degenerate: int
    reference_repetition: float | None
    reference_degenerate: int | None

    def reference_numbers(self, earlier: GenerationRecord) -> Mapping[str, Any]:
        """The texts of the reference stand beside the same texts."""
        if [one.text for one in self.samples] != [one.text for one in earlier.samples]:
            return {}
        return {
            "samples": earlier.samples,
            "reference_repetition": earlier.reference_repetition,
            "reference_degenerate": earlier.reference_degenerate,
        }


AnyResult = TypeVar("AnyResult", bound=Measurement)


class EvaluationRecord(StrictRecord):
    """The whole file, or what one judgement adds to it."""

    schema_name: Literal["secateur.evaluation/2"] = Field(default=SCHEMA, alias="schema")
    model: str
    perplexity: list[PerplexityRecord]
    divergence: list[DivergenceRecord]
    tasks: list[TaskRecord]
    generation: list[GenerationRecord]

    @property
    def results(self) -> list[Measurement]:
        """All results, whatever they measure."""
        return [*self.perplexity, *self.divergence, *self.tasks, *self.generation]

    def after(self, earlier: EvaluationRecord) -> EvaluationRecord:
        """These results, and those of an earlier judgement that were not measured again."""
        return EvaluationRecord(
            model=self.model,
            perplexity=merged(earlier.perplexity, self.perplexity),
            divergence=merged(earlier.divergence, self.divergence),
            tasks=merged(earlier.tasks, self.tasks),
            generation=merged(earlier.generation, self.generation),
        )

    def inherited(self) -> EvaluationRecord:
        """The same results for another model with the same weights, each marked as inherited."""

        def marked(results: Sequence[AnyResult]) -> list[AnyResult]:
            return [
                one.model_copy(update={"inherited_from": one.inherited_from or self.model})
                for one in results
            ]

        return EvaluationRecord(
            model=self.model,
            perplexity=marked(self.perplexity),
            divergence=marked(self.divergence),
            tasks=marked(self.tasks),
            generation=marked(self.generation),
        )

    def to_json(self) -> dict[str, Any]:
        """The file's content."""
        return self.model_dump(mode="json", by_alias=True)

    def save(self, file: Path) -> None:
        """Write the file in one step: a write that is stopped leaves what was there.

        Raises:
            CheckpointError: it cannot be written.
        """
        try:
            write_json(file, self.to_json())
        except OSError as error:
            raise CheckpointError(
                f"the evaluation cannot be written: {error}",
                where=str(file),
                remedy="name a file in a folder that exists and can be written (--output)",
            ) from error

    def add_to(self, file: Path) -> None:
        """Enter these results into a file, which need not be there yet.

        Raises:
            CheckpointError: what is there cannot be read, or the file cannot be written.
        """
        (self.after(read_evaluation(file)) if file.is_file() else self).save(file)


def merged(earlier: Sequence[AnyResult], newer: Sequence[AnyResult]) -> list[AnyResult]:
    """Earlier results, those of the same key replaced, and behind them what is new."""
    found: dict[tuple[str, ...], Any] = {one.key: one for one in earlier}
    for one in newer:
        found[one.key] = one.after(found[one.key]) if one.key in found else one
    return list(found.values())


def read_evaluation(file: Path) -> EvaluationRecord:
    """Read the file back, checked; one of the first schema is read as well.

    Raises:
        CheckpointError: it cannot be read, or is not of this schema; every fault is listed.
    """
    remedy = "move the file away and run `secateur evaluate` again"
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
        return EvaluationRecord.model_validate(from_first(values))
    except ValidationError as error:
        faults = [
            f"{'.'.join(str(part) for part in fault['loc'])}: {fault['msg']}"
            for fault in error.errors()
        ]
        raise CheckpointError(
            f"the evaluation is not of the schema {SCHEMA}:\n    " + "\n    ".join(faults),
            where=str(file),
            remedy=remedy,
        ) from None
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"the evaluation cannot be read: {error}", where=str(file), remedy=remedy
        ) from error


def from_first(values: Any) -> Any:
    """The content of a file of the first schema in the form of this one; any other as it is."""
    if not isinstance(values, dict) or values.get("schema") != FIRST_SCHEMA:
        return values
    shared = {name: values.get(name) for name in ("reference", "environment")}

    def each(found: Any) -> Any:
        single = [] if found is None else [found]
        results = found if isinstance(found, list) else single
        return [{**shared, **one} if isinstance(one, dict) else one for one in results]

    kinds = ("perplexity", "divergence", "tasks", "generation")
    others = {k: v for k, v in values.items() if k not in (*shared, *kinds)}
    return {**others, "schema": SCHEMA, **{kind: each(values.get(kind)) for kind in kinds}}
