"""What a diagnosis and a bench record about a finished model."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from secateur.runs.records.base import Record


class FindingEntry(Record):
    """One finding of a diagnosis."""

    id: str
    severity: Literal["error", "warning", "note"]
    where: str
    evidence: str
    remedy: str


class LayerState(Record):
    """The effect of a layer on its inputs, compared with the dense layer."""

    layer: int
    sparsity: float
    relative_error: float | None = None
    cosine: float | None = None
    norm_ratio: float | None = None
    own_error: float | None = None
    contribution: float | None = None
    could_bear: float | None = None


class MatrixState(Record):
    """The counts of a diagnosis for one matrix."""

    name: str
    sparsity: float
    claimed: float | None
    dead_rows: int
    dead_columns: int


class SupportEntry(Record):
    """Whether this machine gains speed from a kind of sparsity."""

    kind: str
    engine: str
    faster: bool | None = None
    reason: str


class TargetMachine(Record):
    """The machine of a diagnosis."""

    cpu: str = ""
    features: tuple[str, ...] = ()
    cuda_capability: str | None = None
    engines: dict[str, str | None] = Field(default_factory=dict)
    supports: tuple[SupportEntry, ...] = ()


class DiagnosisRecord(Record):
    """`diagnosis.json`."""

    schema_name: Literal["secateur.diagnosis/1"] = Field(alias="schema")
    model: str
    dense: str | None = None
    environment: dict[str, Any] = Field(default_factory=dict)
    protocol: dict[str, Any] = Field(default_factory=dict)
    verdict: str = ""
    findings: tuple[FindingEntry, ...]
    layers: tuple[LayerState, ...] = ()
    linears: tuple[MatrixState, ...] = ()
    target: TargetMachine | None = None


class TimingEntry(Record):
    """The timing of one way to run a model, or the reason why it could not run."""

    contender: str
    failure: str | None = None
    tokens_per_second: float | None = None
    tokens_per_second_least: float | None = None
    tokens_per_second_most: float | None = None
    prompt_tokens_per_second: float | None = None
    first_token_seconds: float | None = None
    resident_bytes: int | None = None
    rounds: int | None = None


class Bench(Record):
    """`bench.json`."""

    schema_name: Literal["secateur.bench/1"] = Field("secateur.bench/1", alias="schema")
    model: str = ""
    contenders: tuple[TimingEntry, ...]
    file_bytes: int
    dense_bytes: int
    verdict: str = ""
    protocol: dict[str, Any]
