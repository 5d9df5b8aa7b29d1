"""The result of the demo."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from secateur.models.samples import TEXTS
from secateur.reporting.results.compress import CompressResult
from secateur.reporting.results.evaluate import BenchResult, EvaluateResult
from secateur.reporting.results.next_steps import command, generation
from secateur.reporting.results.prune import PruneResult
from secateur.reporting.tables import (
    Block,
    Line,
    Result,
    Table,
    binary_size,
    next_steps,
    without_blank_lines,
)


@dataclass(frozen=True, repr=False)
class DemoResult(Result):
    """A model that was pruned, packed, timed and evaluated.

    Attributes:
        model: the name of the dense model.
        pruned: the result of `prune`; it contains the result of `compress`.
        bench: the result of `bench`.
        judged: the result of `evaluate`, on one text and some prompts.
        rounded: the result of `compress` for the dense model in int8.
        rounded_judged: the result of `evaluate` for it, on the same text.
        page: the report.
    """

    model: str
    pruned: PruneResult
    bench: BenchResult
    judged: EvaluateResult
    rounded: CompressResult
    rounded_judged: EvaluateResult
    page: Path

    def to_json(self) -> dict[str, Any]:
        """All numbers, by verb."""
        return {
            "report": str(self.page),
            "prune": self.pruned.to_json(),
            "bench": self.bench.to_json(),
            "evaluation": self.judged.to_json(),
            "dense_int8": {
                "compress": self.rounded.to_json(),
                "evaluation": self.rounded_judged.to_json(),
            },
        }

    def blocks(self) -> Sequence[Block]:
        """Size, speed, quality and texts next to the dense model's, and where the files are."""
        first = self.judged.generation[0].samples[0]
        dense, pruned = (
            without_blank_lines(first.prompt + (text or ""))
            for text in (first.reference_text, first.text)
        )
        return [
            Table.of(
                self.model, ("", "dense, bfloat16", "dense, int8", "pruned, int8"), self.rows()
            ),
            Line(""),
            Line(f"dense writes:  {dense}"),
            Line(""),
            Line(f"pruned writes: {pruned}"),
            *self.places(),
        ]

    def rows(self) -> list[tuple[str, ...]]:
        """The measurements of the dense model, of its int8 weights, and of the pruned model."""
        [text], packed = self.judged.texts, self.pruned.compression
        assert packed is not None
        assert self.pruned.manifest is not None
        cost = self.pruned.manifest.cost
        rates = {s.name: s.tokens_per_second for s in self.bench.speeds if s.failure is None}
        speeds = (
            f"{rates[name]:.0f}" if name in rates else "not measured"
            for name in ("dense bf16", "dense int8", "packed")
        )
        sizes = (packed.bfloat16_bytes, self.rounded.file_bytes, packed.file_bytes)
        rounded = self.rounded_judged.perplexity
        perplexities = (text.reference_perplexity, rounded, text.perplexity)
        return [
            ("weight files", *map(binary_size, sizes)),
            ("tokens per second, our kernels", *speeds),
            ("perplexity", *(f"{number:.2f}" for number in perplexities)),
            ("zeros in decoder matrices", "", "", f"{packed.sparsity:.2%}"),
            ("time to prune", "", "", f"{cost.seconds:.0f} s"),
            ("peak memory", "", "", binary_size(cost.peak_resident_bytes)),
        ]

    def places(self) -> list[Block]:
        """Where the files are, and what to try next."""
        folder = self.pruned.output
        assert folder is not None
        own = ("prune", "MODEL", "--sparsity", "0.5", "--calibration", TEXTS[0])
        return next_steps(
            {
                "the packed model": folder,
                "its card": folder / "README.md",
                "the report": self.page.resolve(),
            },
            {
                **generation(folder),
                "time it in more ways": command("bench", folder),
                "see what pruning your own model needs": command(*own, "--dry-run"),
                "prune your own model, a folder or a hub id": command(
                    *own, "--compress", "int8", "--output", "MODEL-pruned"
                ),
            },
        )
