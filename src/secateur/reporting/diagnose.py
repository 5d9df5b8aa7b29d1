"""What `diagnose` and `inspect` return."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pydantic import Field, InstanceOf
from pydantic_core import to_jsonable_python

from secateur.diagnostics.audit import Audit, LinearCount
from secateur.diagnostics.drift import LayerDrift
from secateur.diagnostics.findings import Claims
from secateur.diagnostics.weights import Weights, layer_sparsity
from secateur.models.header import GgufHeader, GgufTensor
from secateur.reporting.models import stored_as
from secateur.reporting.tables import (
    Block,
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
        zeros, weights = (sum(getattr(x, k) for x in audit.linears) for k in ("zeros", "weights"))
        rows = [
            ("family", audit.family),
            ("decoder layers", str(audit.num_hidden_layers)),
            ("parameters", f"{audit.parameters:,}"),
            ("weight files", binary_size(audit.file_bytes)),
            ("compressed", audit.compressed or None),
            ("stored as", _sizes(audit.dtypes)),
            ("zeros in decoder matrices", _share_of(zeros, weights)),
            ("zeros in all parameters", _share_of(audit.zeros, audit.parameters)),
            ("cannot be pruned", not_pruned(audit.left)),
            ("experts without calibration tokens", by_layer(self.silent) or None),
        ]
        whole = Table.facts(self.model, rows)
        return [whole, self.layers() if self.layer is None else self.linears(self.layer)]

    def layers(self) -> Table:
        """A line for each decoder layer; one for all that follow each other and do not differ."""
        by_layer: dict[int, list[LinearCount]] = {}
        for linear in self.audit.linears:
            by_layer.setdefault(layer_of(linear.name), []).append(linear)
        same = itertools.groupby(
            sorted(by_layer), lambda index: (index >= 0, _cells(by_layer[index]))
        )
        rows = [(_numbers([*found]), *row) for (_, row), found in same]
        columns = ("layer", "matrices", "weights", "zeros", "fewest zeros", "most zeros")
        return Table.of("decoder layers (--layer N lists the linear layers of one)", columns, rows)

    def linears(self, layer: int) -> Table:
        """A line for each linear of a layer."""
        stored = ("stored as",) if self.audit.compressed else ()
        rows = []
        for linear in (x for x in self.audit.linears if layer_of(x.name) == layer):
            kind = "as it is" if linear.layout is None else stored_as(linear.layout)
            own = (linear.name, *map(str, linear.shape), f"{linear.sparsity:.2%}", kind)
            rows.append(own[: 4 + len(stored)])
        columns = ("name", "out", "in", "zeros", *stored)
        return Table.of(f"linear layers of decoder layer {layer}", columns, rows)


def _cells(linears: Sequence[LinearCount]) -> tuple[str, ...]:
    """The counts of one decoder layer, rounded so that layers with equally many zeros are alike."""
    weights = sum(x.weights for x in linears)
    least = min(linears, key=lambda x: x.sparsity)
    most = max(linears, key=lambda x: x.sparsity)
    differ = most.sparsity - least.sparsity >= 0.001
    ends = [f"{x.sparsity:.1%} {_short(x.name)}" if differ else "" for x in (least, most)]
    return (
        str(len(linears)),
        f"{weights:,}",
        f"{sum(x.zeros for x in linears) / weights:.1%}",
        *ends,
    )


def _numbers(layers: Sequence[int]) -> str:
    """The numbers of layers that follow each other."""
    first, last = layers[0], layers[-1]
    return "shared" if first < 0 else str(first) if first == last else f"{first} to {last}"


def _share_of(zeros: int, weights: int) -> str:
    """Zeros as a share and as a count."""
    return f"{zeros / weights if weights else 0:.2%} ({zeros:,} of {weights:,})"


def _short(name: str) -> str:
    """The last part of a name."""
    return name.removesuffix(".weight").rpartition(".")[2]


@dataclass(frozen=True, repr=False)
class GgufInspectResult(Result):
    """The content of a GGUF file according to its header.

    Attributes:
        model: the name from the user.
        header: metadata and tensors.
        layer: the layer whose tensors are listed; None lists all layers.
    """

    model: str
    header: GgufHeader
    layer: int | None = None

    @property
    def parameters(self) -> int:
        """Number of parameters in all tensors."""
        return sum(tensor.parameters for tensor in self.header.tensors)

    def to_json(self) -> dict[str, Any]:
        """Metadata and tensors."""
        header = to_jsonable_python(self.header)
        return {
            "model": self.model,
            "format": "gguf",
            "version": header["version"],
            "file_bytes": header["file_bytes"],
            "parameters": self.parameters,
            "metadata": header["metadata"],
            "tensors": header["tensors"],
        }

    def blocks(self) -> Sequence[Block]:
        """The whole file, its metadata, and its layers or the tensors of one layer."""
        data, sizes = self.header.metadata, dict[str, int]()
        for tensor in self.header.tensors:
            sizes[tensor.type] = sizes.get(tensor.type, 0) + tensor.size_bytes
        architecture = data.get("general.architecture", "not named")
        rows = [
            ("architecture", str(architecture)),
            ("layers", str(data.get(f"{architecture}.block_count", "not named"))),
            ("parameters", f"{self.parameters:,}"),
            ("file", binary_size(self.header.file_bytes)),
            ("stored as", _sizes(dict(sorted(sizes.items(), key=lambda item: -item[1])))),
        ]
        found: list[Block] = [Table.facts(self.model, rows)]
        if self.layer is None:
            lines = {key: " ".join(str(value).split()) for key, value in data.items()}
            metadata = [(k, x if len(x) <= 72 else f"{x[:69]}...") for k, x in lines.items()]
            found += [Table.facts("metadata", metadata), self.layers()]
        else:
            own = [
                (x.name, " x ".join(map(str, x.shape)), x.type, f"{x.size_bytes:,} bytes")
                for x in self.header.tensors
                if layer_of(x.name) == self.layer
            ]
            columns = ("name", "shape", "type", "size")
            found.append(Table.of(f"tensors of layer {self.layer}", columns, own))
        return [*found, Line("zeros were not counted: --zeros reads the weights", style="dim")]

    def layers(self) -> Table:
        """A line for each run of equal layers, and one for each tensor outside them."""
        by_layer: dict[int, list[GgufTensor]] = {}
        for tensor in self.header.tensors:
            by_layer.setdefault(layer_of(tensor.name), []).append(tensor)
        outside = by_layer.pop(-1, [])
        same = itertools.groupby(sorted(by_layer), lambda index: _cells_of(by_layer[index]))
        runs = [([*found], row) for row, found in same]
        rows = [(f"{_numbers(i)}{', each' * (len(i) > 1)}", *row) for i, row in runs]
        rows += [(x.name, *_cells_of([x])) for x in outside]
        columns = ("layer", "tensors", "parameters", "size", "stored as")
        return Table.of("layers (--layer N lists the tensors of one)", columns, rows)


def _cells_of(tensors: Sequence[GgufTensor]) -> tuple[str, ...]:
    """Count, parameters, size and types of some tensors."""
    return (
        str(len(tensors)),
        f"{sum(x.parameters for x in tensors):,}",
        f"{sum(x.size_bytes for x in tensors):,} bytes",
        ", ".join(dict.fromkeys(x.type for x in tensors)),
    )


def _sizes(types: Mapping[str, int]) -> str:
    """Types with their sizes in bytes."""
    return ", ".join(f"{kind} ({binary_size(size)})" for kind, size in types.items())
