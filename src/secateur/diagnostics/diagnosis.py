"""A whole diagnosis: the findings, and the numbers of every layer and linear behind them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from secateur.diagnostics.claims import Claims
from secateur.diagnostics.drift import LayerDrift
from secateur.diagnostics.findings import Finding
from secateur.diagnostics.target import Machine
from secateur.diagnostics.weights import Weights

__all__ = ["SCHEMA", "Diagnosis", "layer_sparsity"]

SCHEMA = "secateur.diagnosis/1"


@dataclass(frozen=True)
class Diagnosis:
    """The health of a model.

    Attributes:
        model: the name from the user.
        dense: the name of its reference; None without one.
        findings: the worst first.
        weights: every matrix.
        claims: of the records of its run.
        drift: of the layers; empty without a reference.
        bears: the sparsity that each layer could bear, where it is known.
        target: this machine.
        environment: versions and hardware.
        protocol: the text that the layers were compared on.
    """

    model: str
    dense: str | None
    findings: list[Finding]
    weights: Weights
    claims: Claims
    drift: Sequence[LayerDrift]
    bears: Mapping[int, float]
    target: Machine
    environment: dict[str, Any]
    protocol: dict[str, Any] = field(default_factory=dict)

    def count(self, severity: str) -> int:
        """The number of findings of a severity."""
        return sum(x.severity == severity for x in self.findings)

    @property
    def verdict(self) -> str:
        """One line: healthy, or the number of findings."""
        errors, warnings, notes = (self.count(s) for s in ("error", "warning", "note"))
        looked = f"{self.weights.tensors} tensors, {len(self.weights.linears)} linears"
        if self.drift:
            looked += f", {len(self.drift)} layers beside {self.dense}"
        counts = [f"{n} {what}{'s' * (n != 1)}" for n, what in ((errors, "error"),
                (warnings, "warning")) if n]  # fmt: skip
        also = f"; {notes} note{'s' * (notes != 1)}" if notes else ""
        return f"{' and '.join(counts) or 'healthy: no error, no warning'} ({looked}{also})"

    def to_json(self) -> dict[str, Any]:
        """The content of `secateur/diagnosis.json`."""
        drift = {x.layer: x for x in self.drift}
        return {
            "schema": SCHEMA,
            "model": self.model,
            "dense": self.dense,
            "environment": self.environment,
            "protocol": self.protocol,
            "verdict": self.verdict,
            "findings": [x.to_json() for x in self.findings],
            "layers": [
                {"layer": index, "sparsity": sparsity, **layer_numbers(drift.get(index)),
                 "could_bear": self.bears.get(index)}
                for index, sparsity in layer_sparsity(self.weights).items()
            ],
            "linears": [
                {
                    "name": x.name,
                    "sparsity": x.sparsity,
                    "claimed": self.claims.claimed(x.name),
                    "dead_rows": int(x.dead_rows.sum()),
                    "dead_columns": int(x.dead_columns.sum()),
                }
                for x in self.weights.linears
            ],
            "target": self.target.to_json(),
        }  # fmt: skip


def layer_sparsity(weights: Weights) -> dict[int, float]:
    """The fraction of zeros in the matrices of each decoder layer."""
    found = {}
    for index in dict.fromkeys(x.layer for x in weights.linears):
        same = [x for x in weights.linears if x.layer == index]
        found[index] = sum(x.zeros for x in same) / sum(x.shape[0] * x.shape[1] for x in same)
    return found


def layer_numbers(drift: LayerDrift | None) -> dict[str, float | None]:
    """The numbers of a layer; null where they are unknown or not finite."""
    names = ("relative_error", "cosine", "norm_ratio", "own_error", "contribution")
    known = drift is not None and not drift.not_finite
    return {name: getattr(drift, name) if known else None for name in names}
