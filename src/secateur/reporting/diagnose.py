"""What `diagnose` and `inspect` return."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Sequence
from typing import Any

from pydantic import Field, InstanceOf

from secateur.diagnostics.audit import Audit, LinearCount
from secateur.diagnostics.drift import LayerDrift
from secateur.diagnostics.findings import Claims
from secateur.diagnostics.weights import Weights, layer_sparsity
from secateur.reporting.fields import Result, blocks_of
from secateur.reporting.models import by_layer, not_pruned, stored_as
from secateur.reporting.tables import Block, Table, binary_size, layer_of
from secateur.runs import measured

STYLES = {"error": "bold red", "warning": "yellow", "note": "dim"}


class DiagnoseResult(Result, measured.DiagnosisRecord):
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
        findings: Sequence[measured.Finding],
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
            measured.LayerState(
                layer=index,
                sparsity=sparsity,
                could_bear=bears.get(index),
                **{
                    name: getattr(finite.get(index), name, None)
                    for name in measured.Drift.model_fields
                },
            )
            for index, sparsity in layer_sparsity(weights).items()
        )
        linears = tuple(
            measured.MatrixState(
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

    def tables(self) -> list[Block]:
        """The tables about its record."""
        return diagnosis(self)


def diagnosis(found: measured.DiagnosisRecord) -> list[Block]:
    """The verdict in a line, then the findings."""
    rows = [{"of": x, "style": STYLES[x.severity]} for x in found.findings]
    return blocks_of("DiagnosisRecord", found, rows=rows)


def _verdict(findings: Sequence[measured.Finding], looked: str) -> str:
    """One line: healthy, or the numbers of errors and warnings."""
    counts = Counter(x.severity for x in findings)
    said = {
        kind: f"{n} {kind}{'s' * (n != 1)}"
        for kind in ("error", "warning", "note")
        if (n := counts[kind])
    }
    notes = f"; {said.pop('note')}" if "note" in said else ""
    return f"{' and '.join(said.values()) or 'healthy: no error, no warning'} ({looked}{notes})"


class InspectResult(Result):
    """The parts of a model, and where its zeros are.

    Attributes:
        model: the name from the user.
        audit: the counts.
        layer: the decoder layer whose linears are listed; None lists all layers.
        silent: experts that got no calibration token when the model was pruned, by layer.
    """

    model: str
    audit: InstanceOf[Audit]
    layer: int | None = Field(None, exclude=True)
    silent: dict[str, list[int]] = Field(default_factory=dict, serialization_alias="silent_experts")

    joined = "audit"

    def tables(self) -> list[Block]:
        """The whole model, then all layers or the linears of one layer."""
        audit, layer = self.audit, self.layer
        counts = [sum(getattr(x, key) for x in audit.linears) for key in ("zeros", "weights")]
        found = blocks_of(
            "InspectResult",
            self,
            stored=[f"{kind} ({binary_size(size)})" for kind, size in audit.dtypes.items()],
            linear=_share_of(*counts),
            share=_share_of(audit.zeros, audit.parameters),
            unpruned=not_pruned(audit.left),
            unseen=by_layer(self.silent),
            linears=[
                {"of": x, "stored": stored_as(x.layout) if x.layout else None}
                for x in audit.linears
                if layer_of(x.name) == layer
            ],
        )
        return [*found, self.layers()] if layer is None else found

    def layers(self) -> Table:
        """A line for each decoder layer; one for all that follow each other and do not differ."""
        layers: dict[int, list[LinearCount]] = {}
        for linear in self.audit.linears:
            layers.setdefault(layer_of(linear.name), []).append(linear)
        cells = {index: _row_of(layers[index]) for index in sorted(layers)}
        # experts that the layers share are counted as layer -1
        alike = itertools.groupby(cells, lambda index: (index >= 0, cells[index]))
        rows = [(_numbers([*numbers]), *row) for (_, row), numbers in alike]
        columns = ("layer", "matrices", "weights", "zeros", "fewest zeros", "most zeros")
        return Table.of("decoder layers (--layer N lists the linear layers of one)", columns, rows)


def _share_of(zeros: int, weights: int) -> str:
    """Zeros as a share and as a count."""
    return f"{zeros / weights if weights else 0:.2%} ({zeros:,} of {weights:,})"


def _row_of(linears: Sequence[LinearCount]) -> tuple[str, ...]:
    """The counts of one decoder layer, rounded so that layers with equally many zeros are alike."""
    weights = sum(x.weights for x in linears)
    # a layer of one matrix has both ends
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
