"""`secateur/evaluation.json`: what a model was judged to be, every number with its protocol.

Written by `secateur eval`; read by the report and the sweep. Documented in `docs/evaluation.md`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from secateur.errors import CheckpointError

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

SCHEMA: Literal["secateur.evaluation/1"] = "secateur.evaluation/1"


class Record(BaseModel):
    """A part of the file. Keys that are unknown are faults: a typo must not pass as silence."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class PerplexityRecord(Record):
    """Perplexity on one text; `reference_perplexity` is the dense model's on the same windows."""

    text: str
    perplexity: float
    mean_loss: float
    standard_error: float | None
    reference_perplexity: float | None
    protocol: dict[str, Any]
    protocol_id: str
    seconds: float


class DivergenceRecord(Record):
    """Distance from the reference on the first text, nats per token."""

    text: str
    kl: float
    kl_standard_error: float | None
    top1_agreement: float = Field(ge=0, le=1)
    top1_standard_error: float | None
    loss_change: float
    loss_change_standard_error: float | None
    tokens: int
    protocol: dict[str, Any]
    protocol_id: str


class TaskRecord(Record):
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
    protocol: dict[str, Any]
    protocol_id: str


class SampleRecord(Record):
    """A prompt, and what the model and the reference made of it."""

    prompt: str
    text: str
    reference_text: str | None
    repetition: float = Field(ge=0, le=1)
    reference_repetition: float | None
    degenerate: bool


class GenerationRecord(Record):
    """Texts; `repetition` is the mean of the samples, `degenerate` their count."""

    samples: list[SampleRecord]
    repetition: float
    degenerate: int
    reference_repetition: float | None
    reference_degenerate: int | None
    protocol: dict[str, Any]
    protocol_id: str


class EvaluationRecord(Record):
    """The whole file."""

    schema_name: Literal["secateur.evaluation/1"] = Field(default=SCHEMA, alias="schema")
    model: str
    reference: str | None
    environment: dict[str, Any]
    perplexity: list[PerplexityRecord]
    divergence: DivergenceRecord | None
    tasks: list[TaskRecord]
    generation: GenerationRecord | None

    def to_json(self) -> dict[str, Any]:
        """The file's content."""
        return self.model_dump(mode="json", by_alias=True)

    def save(self, file: Path) -> None:
        """Write the file.

        Raises:
            CheckpointError: it cannot be written.
        """
        text = json.dumps(self.to_json(), indent=2, ensure_ascii=False) + "\n"
        try:
            file.write_text(text, encoding="utf-8")
        except OSError as error:
            raise CheckpointError(
                f"the evaluation cannot be written: {error}",
                where=str(file),
                remedy="name a file in a folder that exists and can be written (--output)",
            ) from error


def read_evaluation(file: Path) -> EvaluationRecord:
    """Read the file back, checked.

    Raises:
        CheckpointError: it cannot be read, or is not of this schema; every fault is listed.
    """
    remedy = "run `secateur eval` again"
    try:
        return EvaluationRecord.model_validate(json.loads(file.read_text(encoding="utf-8")))
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
