"""What a pruning run hands back to Python."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from secateur.models.inventory import Left
from secateur.reporting.compression_report import CompressionReport

__all__ = ["PruneReport"]


@dataclass(frozen=True)
class PruneReport:
    """What a run did.

    Attributes:
        sparsity: fraction of zeros in the matrices of the decoder layers.
        layers: per layer, the records of its linears.
        left: matrices of the model that were not pruned, and why.
        compression: how the result was compressed, if it was.
        manifest: versions, hardware, choices, cost and result; empty for a model pruned in place.
        output: the folder written, if any.
    """

    sparsity: float
    layers: list[dict[str, Any]]
    manifest: dict[str, Any] = field(default_factory=dict)
    output: Path | None = None
    left: list[Left] = field(default_factory=list)
    compression: CompressionReport | None = None

    def to_json(self) -> dict[str, Any]:
        """The manifest, where the result is, and how it was compressed."""
        packed = {} if self.compression is None else {"compression": self.compression.to_json()}
        return {"output": str(self.output), **self.manifest, **packed}
