"""What `train` returns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from secateur.reporting.results.next_steps import after_a_dense_folder
from secateur.reporting.results.result import Result
from secateur.reporting.tables import Block, Table
from secateur.reporting.wording import binary_size


@dataclass(frozen=True, repr=False)
class TrainResult(Result):
    """The result of a training.

    Attributes:
        output: the output folder.
        sparsity: fraction of zeros in the matrices of the decoder layers, counted in the files.
        steps: optimizer steps.
        tokens: tokens that the model read.
        perplexity_before: validation perplexity before the training; None without validation.
        perplexity_after: validation perplexity of the weights that were kept.
        manifest: versions, hardware, text, choices, cost and result.
    """

    output: Path
    sparsity: float
    steps: int
    tokens: int
    perplexity_before: float | None = None
    perplexity_after: float | None = None
    manifest: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """The folder and the manifest of this training."""
        return {"output": str(self.output), **self.manifest}

    def blocks(self) -> Sequence[Block]:
        """One table."""
        result, cost = self.manifest["result"], self.manifest["cost"]
        seconds = cost["training_seconds"]
        rows = [
            ("objective", self.manifest["objective"]),
            ("zeros in decoder matrices", f"{self.sparsity:.2%}"),
            ("read", f"{self.tokens:,} tokens in {self.steps:,} steps"),
            ("time", f"{seconds:.1f} s, {self.tokens / seconds:,.0f} tokens/s"),
            ("peak memory", binary_size(cost["peak_resident_bytes"])),
            ("output", str(self.output)),
        ]
        if self.perplexity_after is not None:
            change = f"{self.perplexity_before:.3f} → {self.perplexity_after:.3f}"
            rows.insert(2, ("validation perplexity", f"{change} at step {result['best_step']}"))
        return [Table.facts("trained", rows), *after_a_dense_folder(self.output, self.sparsity)]
