"""What `diagnose` and `inspect` return."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pydantic import Field, InstanceOf

from secateur.diagnostics.audit import Audit, LinearCount
from secateur.diagnostics.drift import LayerDrift
from secateur.diagnostics.findings import Claims
from secateur.diagnostics.weights import Weights, layer_sparsity
from secateur.reporting.models import stored_as
from secateur.reporting.tables import (
    Block,
    Columns,
    Line,
    Result,
    Table,
    binary_size,
    by_layer,
    counted,
    layer_of,
    not_pruned,
)
from secateur.runs.records.measured import (
    DiagnosisRecord,
    Drift,
    Finding,
    LayerState,
    MatrixState,
)

Row = tuple[str, ...]

STYLES = {"error": "bold red", "warning": "yellow", "note": "dim"}


class DiagnoseResult(Result, DiagnosisRecord):
    """The health of a model: its record, and what the record was made from.

    Attributes:
        weights: counts of every matrix.
        drift: distance of each layer from the dense model's; empty without a dense model.
        bears: the sparsity that each layer could bear, if it is known.
    """

    weights: InstanceOf[Weights] = Field(exclude=True)
    drift: tuple[InstanceOf[LayerDrift], ...] = Field(exclude=True)
    bears: dict[int, float] = Field(exclude=True)

    @classmethod
    def of(
        cls,
        weights: Weights,
        claims: Claims,
        drift: Sequence[LayerDrift],
        bears: dict[int, float],
        *,
        findings: Sequence[Finding],
        dense: str | None,
        **facts: Any,
    ) -> DiagnoseResult:
        """Make the record.

        Args:
            weights: counts of every matrix.
            claims: the claims in the records of its run.
            drift: distance of each layer from the dense model's; empty without a dense model.
            bears: the sparsity that each layer could bear, if it is known.
            findings: the findings, the worst first.
            dense: the name of the dense model; None without one.
            **facts: the other fields of the record.
        """
        finite = {x.layer: x for x in drift if not x.not_finite}
        layers = tuple(
            LayerState(
                layer=index,
                sparsity=sparsity,
                could_bear=bears.get(index),
                **{name: getattr(finite.get(index), name, None) for name in Drift.model_fields},
            )
            for index, sparsity in layer_sparsity(weights).items()
        )
        linears = tuple(
            MatrixState(
                name=x.name,
                sparsity=x.sparsity,
                claimed=claims.claimed(x.name),
                dead_rows=int(x.dead_rows.sum()),
                dead_columns=int(x.dead_columns.sum()),
            )
            for x in weights.linears
        )
        looked = f"{weights.tensors} tensors, {len(weights.linears)} linear layers"
        if drift:
            looked += f", {len(drift)} layers beside {dense}"
        return cls(
            schema_name="secateur.diagnosis/1",
            dense=dense,
            findings=[*findings],
            verdict=_verdict(findings, looked),
            layers=layers,
            linears=linears,
            weights=weights,
            drift=tuple(drift),
            bears=bears,
            **facts,
        )

    @property
    def exit_code(self) -> int:
        """3 if something is proven wrong."""
        return 3 * bool(self.count("error"))

    def count(self, severity: str) -> int:
        """The number of findings of a severity."""
        return sum(x.severity == severity for x in self.findings)

    def blocks(self) -> Sequence[Block]:
        """The tables about its record."""
        return diagnosis_blocks(self)


def diagnosis_blocks(found: DiagnosisRecord) -> list[Block]:
    """The verdict in a line, then the findings."""
    verdict = Line(f"{found.model}: {found.verdict}")
    if not found.findings:
        return [verdict]
    rows = [
        (f"{x.severity}\n{x.id}", f"{x.where}\n{x.evidence}\n→ {x.remedy}") for x in found.findings
    ]
    styles = [STYLES[x.severity] for x in found.findings]
    columns = ("what", "where, evidence → remedy")
    return [verdict, Table.of("findings", columns, rows, numbers=2, styles=styles)]


def _verdict(findings: Sequence[Finding], looked: str) -> str:
    """One line: healthy, or the numbers of errors and warnings."""
    counts = Counter(x.severity for x in findings)
    faults = [counted(counts[kind], kind) for kind in ("error", "warning") if counts[kind]]
    notes = f"; {counted(counts['note'], 'note')}" if counts["note"] else ""
    return f"{' and '.join(faults) or 'healthy: no error, no warning'} ({looked}{notes})"


@dataclass(frozen=True, repr=False)
class InspectResult(Result):
    """The parts of a model, and where its zeros are.

    Attributes:
        model: the name from the user.
        audit: the counts.
        layer: the decoder layer whose linears are listed; None lists all layers.
        silent: experts that got no calibration token when the model was pruned, by layer.
    """

    model: str
    audit: Audit
    layer: int | None = None
    silent: Mapping[str, Sequence[int]] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """All counts."""
        silent = {layer: list(numbers) for layer, numbers in self.silent.items()}
        return {"model": self.model, **self.audit.to_json(), "silent_experts": silent}

    def blocks(self) -> Sequence[Block]:
        """The whole model, then all layers or the linears of one layer."""
        audit = self.audit
        counts = [sum(getattr(x, key) for x in audit.linears) for key in ("zeros", "weights")]
        values = {
            **vars(audit),
            "stored": _sizes(audit.dtypes),
            "linear": _share_of(*counts),
            "share": _share_of(audit.zeros, audit.parameters),
            "left": not_pruned(audit.left),
            "silent": by_layer(self.silent),
        }
        whole = Table.about(self.model, INSPECTED, values)
        return [whole, self.layers() if self.layer is None else self.linears(self.layer)]

    def layers(self) -> Table:
        """A line for each decoder layer; one for all that follow each other and do not differ."""
        columns = ("layer", "matrices", "weights", "zeros", "fewest zeros", "most zeros")
        rows = _alike(self.audit.linears, _cells)
        return Table.of("decoder layers (--layer N lists the linear layers of one)", columns, rows)

    def linears(self, layer: int) -> Table:
        """A line for each linear of a layer."""
        own = [x for x in self.audit.linears if layer_of(x.name) == layer]
        stored = {"stored": lambda x: stored_as(x.layout) if x.layout else None}
        return Table.of_records(f"linear layers of decoder layer {layer}", own, LINEARS, **stored)


INSPECTED = """
    family | {family}
    decoder layers | {num_hidden_layers}
    parameters | {parameters:,}
    weight files | {file_bytes:size}
    compressed | {compressed}
    stored as | {stored}
    zeros in decoder matrices | {linear}
    zeros in all parameters | {share}
    cannot be pruned | {left}
    experts without calibration tokens | {silent}
"""
LINEARS = Columns(
    "name | out | in | zeros | stored as",
    "{name} | {shape[0]} | {shape[1]} | {sparsity:.2%} | {stored}",
)


def _share_of(zeros: int, weights: int) -> str:
    """Zeros as a share and as a count."""
    return f"{zeros / weights if weights else 0:.2%} ({zeros:,} of {weights:,})"


def _cells(linears: Sequence[LinearCount]) -> Row:
    """The counts of one decoder layer, rounded so that layers with equally many zeros are alike."""
    weights = sum(x.weights for x in linears)
    least, *_, most = sorted([*linears, *linears], key=lambda x: x.sparsity)
    differ = most.sparsity - least.sparsity >= 0.001
    names = [x.name.removesuffix(".weight").rpartition(".")[2] for x in (least, most)]
    ends = [f"{x.sparsity:.1%} {name}" for x, name in zip((least, most), names, strict=True)]
    zeros = f"{sum(x.zeros for x in linears) / weights:.1%}"
    return (str(len(linears)), f"{weights:,}", zeros, *(ends if differ else ("", "")))


def _numbers(layers: Sequence[int]) -> str:
    """The numbers of layers that follow each other."""
    first, last = layers[0], layers[-1]
    shared, one = "shared" if first < 0 else str(first), first == last
    return shared if one else f"{first} to {last}, each"


def _alike(parts: Iterable[Any], cells: Callable[[list[Any]], Row]) -> list[Row]:
    """A row for each decoder layer; one for all that follow each other and have the same cells."""
    layers: dict[int, list[Any]] = {}
    for part in parts:
        layers.setdefault(layer_of(part.name), []).append(part)
    found = itertools.groupby(sorted(layers), lambda index: (index >= 0, cells(layers[index])))
    return [(_numbers([*numbers]), *row) for (_, row), numbers in found]


def _sizes(types: Mapping[str, int]) -> str:
    """Types with their sizes in bytes."""
    return ", ".join(f"{kind} ({binary_size(size)})" for kind, size in types.items())
