"""`sweep.json`: perplexity against sparsity."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from secateur.runs.records.base import Record

PointKey = tuple[str, str, float]
"""Method, pattern and sparsity of a point of a sweep."""


class SweepPoint(Record):
    """One pruned model of a sweep, evaluated.

    Attributes:
        method: a famous name, or a preset.
        pattern: which zeros are allowed.
        sparsity: the fraction of zeros that was requested.
        perplexity: by text.
        excess: ln(perplexity) − ln(dense perplexity), nats a token, by text.
        zeros: the fraction of zeros found in the decoder's matrices.
        seconds: of pruning.
        peak_resident_bytes: of pruning.
        notes: the folder that holds the notes of the run (`secateur/`), within that of the sweep.
        folder: the same if the weights are there too, else None.
    """

    method: str
    pattern: str
    sparsity: float
    perplexity: dict[str, float]
    excess: dict[str, float]
    zeros: float
    seconds: float
    peak_resident_bytes: int
    notes: str
    folder: str | None = None

    @property
    def key(self) -> PointKey:
        """What distinguishes points."""
        return self.method, self.pattern, round(self.sparsity, 6)


class SweepDense(Record):
    """The dense model of a sweep: its perplexity by text; empty until it is evaluated."""

    perplexity: dict[str, float] = Field(default_factory=dict)


class Sweep(Record):
    """`sweep.json`.

    Attributes:
        model: the model that was pruned.
        dense: what all points are compared with.
        environment: versions and hardware.
        conditions: what all points have in common; a resumed sweep has the same.
        protocol: of the perplexity, by text.
        calibration: where the windows are from; None if no method needs any.
        points: in the order of the plan.
        failures: points that could not be made, and why.
    """

    schema_name: Literal["secateur.sweep/1"] = Field("secateur.sweep/1", alias="schema")
    model: str
    dense: SweepDense
    environment: dict[str, Any]
    conditions: dict[str, Any]
    protocol: dict[str, dict[str, Any]]
    calibration: dict[str, Any] | None
    points: tuple[SweepPoint, ...]
    failures: tuple[dict[str, Any], ...]

    @model_validator(mode="after")
    def same_texts(self) -> Sweep:
        """Every point has the texts of the dense model."""
        texts = self.dense.perplexity.keys()
        for point in self.points:
            if not point.perplexity.keys() == point.excess.keys() == texts:
                raise ValueError(f"{point.method} {point.pattern} was evaluated on other texts")
        return self
