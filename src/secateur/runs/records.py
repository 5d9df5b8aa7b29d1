"""The schemas of the files that a run writes with a model, for writers and readers alike.

    manifest.json        Manifest         prune, structure
    layers.jsonl         Layer            prune, a line for each decoder layer
    training.json        [Training]       retrain, distill, an entry for each training
    chain.json           Chain            chain
    compression.json     Compression      compress
    diagnosis.json       DiagnosisRecord  diagnose
    bench.json           Bench            bench

`evaluation.json` has its schema in `evaluation.py`, `sweep.json` in `reporting/`. Writers use
`declared`, which refuses undeclared keys, so no file contains a key that readers do not know.
Readers use `read_record`, which ignores keys of newer releases.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from secateur.errors import CheckpointError

__all__ = [
    "MANIFEST_VERSION",
    "Bench",
    "Chain",
    "Compression",
    "DiagnosisRecord",
    "FindingEntry",
    "Layer",
    "LinearEntry",
    "Manifest",
    "Record",
    "Training",
    "declared",
    "parsed",
    "read_record",
]

MANIFEST_VERSION = 1


class Record(BaseModel):
    """Part of a file."""

    model_config = ConfigDict(frozen=True, protected_namespaces=(), extra="ignore")


class Source(Record):
    """The source model of a run."""

    name: str
    kind: str
    revision: str | None = None
    file_bytes: int | None = None


class Cost(Record):
    """The cost of a run."""

    seconds: float
    peak_resident_bytes: int
    peak_is_of_this_run_alone: bool = False
    peak_cuda_bytes: int | None = None
    resumed: bool = False
    training_seconds: float | None = None


class RunResult(Record):
    """The result of a run."""

    decoder_sparsity: float
    model_sparsity: float
    parameters: int
    file_bytes: int


class Counted(Record):
    """The parameters of a model by kind."""

    parameters: int
    decoder: int
    file_bytes: int
    attention: int = 0
    ffn: int = 0
    experts: int = 0
    norms: int = 0
    embeddings: int = 0
    other: int = 0
    kv_cache_bytes_per_token: int = 0


class Structure(Record):
    """What a structured cut removed."""

    before: Counted
    after: Counted
    decoder_removed: float
    removed: float = 0.0
    varied: bool = False
    steps: tuple[dict[str, Any], ...] = ()
    latency: dict[str, Any] | None = None


class LeftEntry(Record):
    """Tensors of one sort that were not pruned; see `models.inventory.Left`."""

    names: str
    reason: str
    tensors: int
    weights: int


class Manifest(Record):
    """`manifest.json`."""

    manifest_version: int = MANIFEST_VERSION
    source: Source
    family: str = ""
    method: dict[str, Any]
    allocation: dict[str, Any]
    calibration: dict[str, Any] | None = None
    calibration_digest: str | None = None
    environment: dict[str, Any]
    plan: dict[str, Any] = Field(default_factory=dict)
    cost: Cost
    result: RunResult
    structure: Structure | None = None
    distillation: dict[str, float] | None = None
    experts: dict[str, Any] | None = None
    collapsed: tuple[str, ...] = ()
    left: tuple[LeftEntry, ...] = ()

    @property
    def lost(self) -> float:
        """The lost fraction of the decoder: cut out or zero."""
        gone = self.structure.decoder_removed if self.structure else 0.0
        return 1 - (1 - gone) * (1 - self.result.decoder_sparsity)


class LinearEntry(Record):
    """One matrix of a line of `layers.jsonl`; see `engine.prune.surgery.LinearRecord`."""

    name: str
    shape: tuple[int, int]
    zeros: int
    asked: float | None = None
    pruned: int | None = None
    error: float | None = None
    lost: float | None = None
    seconds: float = 0.0
    tokens: int | None = None


class Layer(Record):
    """A line of `layers.jsonl`."""

    layer: int
    seconds: float = 0.0
    linears: tuple[LinearEntry, ...]
    reconstruction: dict[str, float] = Field(default_factory=dict)
    collapsed: dict[str, float] = Field(default_factory=dict)
    unseen: tuple[str, ...] = ()


class Training(Record):
    """An entry of `training.json`."""

    verb: Literal["retrain", "distill"]
    source: Source
    objective: str
    text: dict[str, Any]
    learning_rate: float
    optimizer: str
    processes: int
    recipe: dict[str, Any]
    environment: dict[str, Any]
    planned: dict[str, Any]
    cost: Cost
    result: dict[str, Any]


class ChainStep(Record):
    """The state of the model after a step of a chain."""

    step: str
    parameters: int
    zeros: int
    file_bytes: int
    seconds: float
    kept: int


class Chain(Record):
    """`chain.json`."""

    links: tuple[ChainStep, ...]
    output: str


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


class Compression(Record):
    """`compression.json`."""

    source: str = ""
    output: str = ""
    archive: bool = False
    source_bytes: int
    bfloat16_bytes: int
    file_bytes: int
    ratio: float
    sparsity: float
    negative_zeros: int = 0
    linears: dict[str, float] = Field(default_factory=dict)
    formats: dict[str, dict[str, float]] = Field(default_factory=dict)
    embeddings: dict[str, float] = Field(default_factory=dict)
    rounding: dict[str, Any] = Field(default_factory=dict)
    value_error: float | None = None
    seconds: float = 0.0


AnyRecord = TypeVar("AnyRecord", bound=Record)


def declared(record: type[Record], content: Mapping[str, Any]) -> dict[str, Any]:
    """Check the content of a file before it is written.

    Raises:
        ValidationError: the content does not match its declaration, which is a fault in secateur.
    """
    plain = json.loads(json.dumps(content))
    record.model_validate(plain, extra="forbid")
    return dict(content)


def read_record(record: type[AnyRecord], file: Path) -> AnyRecord:
    """Read a JSON file and check its schema.

    Raises:
        CheckpointError: the file cannot be read, is no JSON, or has another schema; names the file.
    """
    try:
        return parsed(record, file.read_text(encoding="utf-8"), str(file))
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(
            f"the file cannot be read: {error}", where=str(file), remedy="make it again"
        ) from error


def parsed(record: type[AnyRecord], text: str, where: str) -> AnyRecord:
    """Parse a JSON text and check its schema.

    Raises:
        CheckpointError: the text is no JSON, or has another schema.
    """
    try:
        return record.model_validate(json.loads(text))
    except ValidationError as error:
        faults = [
            f"{'.'.join(str(part) for part in fault['loc']) or 'all of it'}: {fault['msg']}"
            for fault in error.errors()[:3]
        ]
        raise CheckpointError(
            f"not what this release expects there: {'; '.join(faults)}",
            where=where,
            remedy="write it again with this release of secateur",
        ) from None
    except ValueError as error:
        raise CheckpointError(
            f"not JSON: {error}", where=where, remedy="write it again, or remove it"
        ) from None
