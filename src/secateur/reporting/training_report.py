"""What a training hands back to Python."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

__all__ = ["TrainingReport"]


@dataclass(frozen=True)
class TrainingReport:
    """What a training did.

    Attributes:
        output: the folder written.
        sparsity: fraction of zeros in the matrices of the decoder layers, as saved.
        steps: of the optimizer.
        tokens: that were read.
        perplexity_before: of the validation windows; None without validation.
        perplexity_after: with the weights that were kept.
        manifest: versions, hardware, text, choices, cost and result.
    """

    output: Path
    sparsity: float
    steps: int
    tokens: int
    perplexity_before: float | None = None
    perplexity_after: float | None = None
    manifest: dict[str, Any] = field(default_factory=dict)
