"""What `inspect` returns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from secateur.diagnostics.audit import Audit, LinearCount
from secateur.reporting.results.result import Result
from secateur.reporting.tables import Block, Table, mib, not_pruned

__all__ = ["InspectResult"]


@dataclass(frozen=True)
class InspectResult(Result):
    """What a model is made of, and where its zeros are.

    Attributes:
        model: as it was given.
        audit: the counts.
        layer: the decoder layer whose linears are listed; -1 for all.
    """

    model: str
    audit: Audit
    layer: int = 0

    def to_json(self) -> dict[str, Any]:
        """All counts."""
        return {"model": self.model, **self.audit.to_json()}

    def blocks(self) -> Sequence[Block]:
        """The whole model, then the linears of a layer."""
        audit, layer = self.audit, self.layer
        rows = [
            ("family", audit.family),
            ("decoder layers", str(audit.num_hidden_layers)),
            ("parameters", f"{audit.parameters:,}"),
            ("weight files", mib(audit.file_bytes)),
            ("stored as", ", ".join(f"{k} ({mib(v)})" for k, v in audit.dtypes.items())),
            ("zeros in decoder matrices", f"{audit.sparsity:.4%}"),
            ("zeros in all parameters", f"{audit.model_sparsity:.4%}"),
            ("cannot be pruned", not_pruned(audit.left)),
        ]
        if audit.compressed:
            rows.insert(4, ("compressed", audit.compressed))
        linears = [x for x in audit.linears if layer < 0 or layer_of(x.name) == layer]
        title = "linears" if layer < 0 else f"linears of decoder layer {layer}"
        packed = ("stored as",) if audit.compressed else ()
        return [
            Table.facts(self.model, rows),
            Table.of(
                title,
                ("name", "out", "in", "zeros", *packed),
                [linear_row(x, packed=bool(packed)) for x in linears],
            ),
        ]


def linear_row(linear: LinearCount, *, packed: bool) -> tuple[str, ...]:
    """The counts of one linear."""
    out, columns = linear.shape
    stored = (stored_as(linear.layout),) if packed else ()
    return linear.name, str(out), str(columns), f"{linear.sparsity:.4%}", *stored


def layer_of(name: str) -> int:
    """The number of a linear's decoder layer: the first in its name, experts have one behind it."""
    return next((int(part) for part in name.split(".") if part.isdigit()), -1)


def stored_as(layout: dict[str, Any] | None) -> str:
    """A layout in two words."""
    if layout is None:
        return "as it is"
    return f"{layout.get('pattern', layout['format'])} {layout['values']}"
