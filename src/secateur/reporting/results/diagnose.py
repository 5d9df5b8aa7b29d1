"""What `diagnose` returns: findings, and the numbers of every layer and linear behind them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from secateur.diagnostics.claims import Claims
from secateur.diagnostics.drift import LayerDrift
from secateur.diagnostics.findings import Finding
from secateur.diagnostics.target import Machine
from secateur.diagnostics.weights import Weights, layer_sparsity
from secateur.reporting.results.result import Result
from secateur.reporting.tables import Block, Line, Table

SCHEMA = "secateur.diagnosis/1"
STYLES = {"error": "bold red", "warning": "yellow", "note": "dim"}


@dataclass(frozen=True, repr=False)
class DiagnoseResult(Result):
    """The health of a model.

    Attributes:
        model: the name from the user.
        dense: the name of the dense model; None without one.
        findings: the findings, the worst first.
        weights: counts of every matrix.
        claims: the claims in the records of its run.
        drift: distance of each layer from the dense model's; empty without a dense model.
        bears: the sparsity that each layer could bear, if it is known.
        target: what this machine can speed up.
        environment: versions and hardware.
        protocol: the text on which the layers were compared.
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
        """One line: healthy, or the numbers of errors and warnings."""
        errors, warnings, notes = (self.count(s) for s in ("error", "warning", "note"))
        looked = f"{self.weights.tensors} tensors, {len(self.weights.linears)} linear layers"
        if self.drift:
            looked += f", {len(self.drift)} layers beside {self.dense}"
        counts = [f"{n} {what}{'s' * (n != 1)}" for n, what in ((errors, "error"),
                (warnings, "warning")) if n]  # fmt: skip
        also = f"; {notes} note{'s' * (notes != 1)}" if notes else ""
        return f"{' and '.join(counts) or 'healthy: no error, no warning'} ({looked}{also})"

    def blocks(self) -> Sequence[Block]:
        """The verdict in a line, then the findings."""
        verdict = Line(f"{self.model}: {self.verdict}")
        if not self.findings:
            return [verdict]
        rows = [
            (f"{x.severity}\n{x.id}", f"{x.where}\n{x.evidence}\n→ {x.remedy}")
            for x in self.findings
        ]
        styles = [STYLES[x.severity] for x in self.findings]
        columns = ("what", "where, evidence → remedy")
        return [verdict, Table.of("findings", columns, rows, numbers=2, styles=styles)]

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
                {"layer": index, "sparsity": sparsity, **drift_numbers(drift.get(index)),
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


def drift_numbers(drift: LayerDrift | None) -> dict[str, float | None]:
    """The numbers of a layer; null if unknown or not finite."""
    names = ("relative_error", "cosine", "norm_ratio", "own_error", "contribution")
    known = drift is not None and not drift.not_finite
    return {name: getattr(drift, name) if known else None for name in names}


@dataclass(frozen=True, repr=False)
class TargetResult(Result):
    """What this machine can speed up.

    Attributes:
        target: the machine and its engines.
    """

    target: Machine

    def to_json(self) -> dict[str, Any]:
        """All fields of `target`."""
        return self.target.to_json()

    def blocks(self) -> Sequence[Block]:
        """Every kind of sparsity with every engine, then the features of the machine."""
        target, words = self.target, {True: "yes", False: "no", None: "depends"}
        rows = [(s.kind, s.engine, words[s.faster], s.reason) for s in target.supports]
        return [
            Table.of(target.cpu, ("kind", "engine", "faster", "why"), rows, numbers=4),
            Line(f"processor features: {', '.join(target.features) or 'not known'}"),
            Line(f"CUDA capability: {target.cuda_capability or 'no CUDA device'}"),
        ]
