"""What an import records: where a model came from, and the zeros found in it."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from secateur.runs.records.base import Record
from secateur.runs.records.run import Source


class ImportedMatrix(Record):
    """One matrix of the decoder layers.

    Attributes:
        name: its name.
        shape: outputs and inputs.
        zeros: how many weights are zero.
        pattern: N:M, unstructured or dense, found in the written file.
        stored_as: how the source stored it; None as a plain tensor.
        rounded: whether the dtype of the model cannot hold the exact values of the source.
    """

    name: str
    shape: tuple[int, int]
    zeros: int
    pattern: str
    stored_as: str | None = None
    rounded: bool = False


class Import(Record):
    """`import.json`.

    Attributes:
        source: the folder that was imported.
        kind: which kind of source it was.
        masks: name and SHA-256 of the file of masks; None without one.
        adapter: name, kind and SHA-256 of the adapter; None without one.
        told: what the configuration of the source said of its compression.
        dropped: stored tensors that are no part of the model.
        notes: what a user must know, one sentence each.
        environment: versions and hardware.
        seconds: wall time.
        sparsity: of the matrices of the decoder.
        matrices: every matrix of the decoder layers.
    """

    schema_name: Literal["secateur.import/1"] = Field("secateur.import/1", alias="schema")
    source: Source
    kind: str
    masks: dict[str, str] | None = None
    adapter: dict[str, str] | None = None
    told: dict[str, Any] = Field(default_factory=dict)
    dropped: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    environment: dict[str, Any]
    seconds: float
    sparsity: float
    matrices: tuple[ImportedMatrix, ...]
