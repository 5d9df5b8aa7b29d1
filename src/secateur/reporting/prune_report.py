"""What a pruning run hands back to Python."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from secateur.models.inventory import Left

__all__ = ["PruneReport"]


@dataclass(frozen=True)
class PruneReport:
    """What a run did.

    Attributes:
        sparsity: fraction of zeros in the matrices of the decoder layers.
        layers: per layer, the records of its linears.
        left: matrices of the model that were not pruned, and why.
        manifest: versions, hardware, choices, cost and result; empty for a model pruned in place.
        output: the folder written, if any.
    """

    sparsity: float
    layers: list[dict[str, Any]]
    manifest: dict[str, Any] = field(default_factory=dict)
    output: Path | None = None
    left: list[Left] = field(default_factory=list)
