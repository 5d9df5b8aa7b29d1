"""What the files of a run folder hold, as far as the report reads them.

Each shape is checked when its file is read, so that the page never finds a hole. What a newer
release adds is ignored; another schema is refused. `evaluation.json` has a schema of its own in
`reporting/evaluation_schema.py`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from secateur.errors import CheckpointError

__all__ = [
    "Bench",
    "Compression",
    "Diagnosis",
    "Finding",
    "Layer",
    "Manifest",
    "read_shape",
]


class Shape(BaseModel):
    """Part of a file; unknown keys are left alone."""

    model_config = ConfigDict(extra="ignore", frozen=True, protected_namespaces=())


class Source(Shape):
    """The model that was pruned."""

    name: str
    kind: str
    revision: str | None = None


class Cost(Shape):
    """What a run took."""

    seconds: float
    peak_resident_bytes: int
    resumed: bool = False


class Result(Shape):
    """What a run left."""

    decoder_sparsity: float
    model_sparsity: float
    parameters: int
    file_bytes: int


class Counted(Shape):
    """What a model consists of."""

    parameters: int
    decoder: int
    file_bytes: int


class Structure(Shape):
    """What a structured cut took out."""

    before: Counted
    after: Counted
    decoder_removed: float


class NotPruned(Shape):
    """Matrices of one sort that were left as they are."""

    names: str
    reason: str
    weights: int


class Manifest(Shape):
    """`manifest.json`."""

    source: Source
    family: str = ""
    method: dict[str, Any]
    allocation: dict[str, Any]
    calibration: dict[str, Any] | None = None
    environment: dict[str, Any]
    plan: dict[str, Any] = Field(default_factory=dict)
    cost: Cost
    result: Result
    structure: Structure | None = None
    left: list[NotPruned] = Field(default_factory=list)

    @property
    def lost(self) -> float:
        """The fraction of the decoder that is gone: cut out of it, or zero."""
        gone = self.structure.decoder_removed if self.structure else 0.0
        return 1 - (1 - gone) * (1 - self.result.decoder_sparsity)


class Linear(Shape):
    """One matrix of a line of `layers.jsonl`."""

    name: str
    shape: tuple[int, int]
    zeros: int
    error: float | None = None


class Layer(Shape):
    """A line of `layers.jsonl`."""

    layer: int
    seconds: float = 0.0
    linears: tuple[Linear, ...]


class Finding(Shape):
    """Something a diagnosis found."""

    id: str
    severity: Literal["error", "warning", "note"]
    where: str
    evidence: str
    remedy: str


class LayerState(Shape):
    """What a layer does to its inputs, beside the dense one."""

    layer: int
    sparsity: float
    relative_error: float | None = None
    cosine: float | None = None
    norm_ratio: float | None = None
    could_bear: float | None = None


class Support(Shape):
    """Whether this machine gains anything by a kind of sparsity."""

    kind: str
    engine: str
    faster: bool | None = None
    reason: str


class TargetMachine(Shape):
    """What the model was diagnosed for."""

    cpu: str = ""
    features: tuple[str, ...] = ()
    cuda_capability: str | None = None
    supports: tuple[Support, ...] = ()


class Diagnosis(Shape):
    """`diagnosis.json`."""

    schema_name: Literal["secateur.diagnosis/1"] = Field(alias="schema")
    model: str
    dense: str | None = None
    verdict: str = ""
    findings: tuple[Finding, ...]
    layers: tuple[LayerState, ...] = ()
    target: TargetMachine | None = None


class Contender(Shape):
    """One way to run a model, timed; or why it could not run."""

    contender: str
    failure: str | None = None
    tokens_per_second: float | None = None
    tokens_per_second_least: float | None = None
    tokens_per_second_most: float | None = None
    first_token_seconds: float | None = None
    resident_bytes: int | None = None


class Bench(Shape):
    """`bench.json`."""

    contenders: tuple[Contender, ...]
    file_bytes: int
    dense_bytes: int
    verdict: str = ""
    protocol: dict[str, Any]


class Compression(Shape):
    """`compression.json`."""

    source_bytes: int
    bfloat16_bytes: int
    file_bytes: int
    ratio: float
    sparsity: float
    formats: dict[str, dict[str, Any]] = Field(default_factory=dict)


AnyShape = TypeVar("AnyShape", bound=Shape)


def read_shape(shape: type[AnyShape], file: Path) -> AnyShape:
    """Read a JSON file and check that it has the shape that is expected.

    Raises:
        CheckpointError: it cannot be read, is no JSON, or has another shape; it names the file.
    """
    try:
        return parsed(shape, file.read_text(encoding="utf-8"), str(file))
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(
            f"the file cannot be read: {error}", where=str(file), remedy="make it again"
        ) from error


def parsed(shape: type[AnyShape], text: str, where: str) -> AnyShape:
    """A JSON text in the shape that is expected.

    Raises:
        CheckpointError: it is no JSON, or has another shape.
    """
    try:
        return shape.model_validate(json.loads(text))
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
