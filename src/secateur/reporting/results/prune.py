"""What `prune` returns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from secateur.models.inventory import Left
from secateur.reporting.results.compress import CompressResult
from secateur.reporting.results.next_steps import after_a_dense_folder
from secateur.reporting.results.result import Result
from secateur.reporting.tables import Block, Table, by_layer, not_pruned
from secateur.reporting.wording import binary_size


@dataclass(frozen=True, repr=False)
class PruneResult(Result):
    """The result of a pruning run.

    Attributes:
        sparsity: fraction of zeros in the matrices of the decoder layers.
        layers: a record for each decoder layer, as in `layers.jsonl`; `linears` has its matrices.
        manifest: versions, hardware, choices, cost and result; empty for a loaded model.
        output: the output folder; None for a loaded model.
        left: matrices that were not pruned, and the reasons.
        compression: the result of compressing, if the model was compressed.
    """

    sparsity: float
    layers: list[dict[str, Any]]
    manifest: dict[str, Any] = field(default_factory=dict)
    output: Path | None = None
    left: list[Left] = field(default_factory=list)
    compression: CompressResult | None = None

    def to_json(self) -> dict[str, Any]:
        """The folder and its manifest; for a loaded model sparsity, layers and what was left."""
        if self.output is None:
            left = [one.to_json() for one in self.left]
            return {"sparsity": self.sparsity, "layers": self.layers, "left": left}
        packed = {} if self.compression is None else {"compression": self.compression.to_json()}
        return {"output": str(self.output), **self.manifest, **packed}

    def blocks(self) -> Sequence[Block]:
        """One table, and the tables of the compression if there was one."""
        if self.output is None:
            rows = [
                ("zeros in decoder matrices", f"{self.sparsity:.2%}"),
                ("not pruned", not_pruned(self.left)),
            ]
            return [Table.facts("pruned in place", rows)]
        method, result, cost = (self.manifest[key] for key in ("method", "result", "cost"))
        rows = [
            ("method", f"{method['name']}, {method['pattern']}"),
            ("allocation", self.manifest["allocation"]["name"]),
            ("zeros in decoder matrices", f"{result['decoder_sparsity']:.2%}"),
            ("zeros in all parameters", f"{result['model_sparsity']:.2%}"),
            ("not pruned", not_pruned(self.left)),
            ("time", f"{cost['seconds']:.1f} s"),
            ("peak memory", binary_size(cost["peak_resident_bytes"])),
            ("planned memory", binary_size(self.manifest["plan"]["host_peak_bytes"])),
            ("weight files", binary_size(result["file_bytes"])),
        ]
        rows += reach_rows(self.manifest)
        if self.manifest["collapsed"]:
            rows.append(("collapsed", ", ".join(self.manifest["collapsed"])))
        pruned = Table.facts("pruned", [*rows, ("output", str(self.output))])
        if self.compression is not None:
            return [pruned, *self.compression.blocks()]
        return [pruned, *after_a_dense_folder(self.output, self.sparsity)]


def reach_rows(manifest: Mapping[str, Any]) -> list[tuple[str, str]]:
    """How far calibration reached, and the experts that it did not reach."""
    reach, rows = manifest.get("reach") or {}, []
    if reach.get("fewest_tokens") is not None:
        rows.append(
            (
                "calibrated",
                f"{reach['pruned']:,} of {reach['matrices']:,} matrices, with "
                f"{reach['fewest_tokens']:,} tokens or more",
            )
        )
    silent = by_layer((manifest.get("experts") or {}).get("silent", {}))
    return [*rows, ("experts without tokens", f"left dense: {silent}")] if silent else rows
