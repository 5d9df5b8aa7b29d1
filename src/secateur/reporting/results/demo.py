"""The result of the demo."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from secateur.reporting.results.bench import BenchResult
from secateur.reporting.results.evaluate import EvaluateResult
from secateur.reporting.results.prune import PruneResult
from secateur.reporting.results.result import Result
from secateur.reporting.tables import Block, Line, Table, gib, mib, next_steps
from secateur.reporting.wording import without_blank_lines

__all__ = ["DemoResult"]


@dataclass(frozen=True)
class DemoResult(Result):
    """A model that was pruned, packed, timed and evaluated.

    Attributes:
        model: the name of the dense model.
        pruned: the result of `prune`; it contains the result of `compress`.
        bench: the result of `bench`.
        judged: the result of `evaluate`, on one text and some prompts.
        page: the report.
    """

    model: str
    pruned: PruneResult
    bench: BenchResult
    judged: EvaluateResult
    page: Path

    def to_json(self) -> dict[str, Any]:
        """All numbers, by verb."""
        return {
            "report": str(self.page),
            "prune": self.pruned.to_json(),
            "bench": self.bench.to_json(),
            "evaluation": self.judged.to_json(),
        }

    def blocks(self) -> Sequence[Block]:
        """Size, speed, quality and texts next to the dense model's, and where the files are."""
        first = self.judged.generation[0].samples[0]
        dense, pruned = (
            without_blank_lines(first.prompt + (text or ""))
            for text in (first.reference_text, first.text)
        )
        return [
            Table.of(self.model, ("", "dense", "pruned, int8"), self.rows()),
            Line(""),
            Line(f"dense writes:  {dense}"),
            Line(""),
            Line(f"pruned writes: {pruned}"),
            *self.places(),
        ]

    def rows(self) -> list[tuple[str, str, str]]:
        """The measurements of the dense and of the pruned model."""
        [text], packed = self.judged.texts, self.pruned.compression
        assert packed is not None
        cost = self.pruned.manifest["cost"]
        rates = {s.name: s.tokens_per_second for s in self.bench.speeds if s.failure is None}
        gain = self.bench.gain([name for name in rates if not name.startswith("packed")])
        dense = f"{rates[gain[0]]:.0f} ({gain[0]})" if gain else "not measured"
        return [
            ("weight files", f"{mib(packed.bfloat16_bytes)} (bfloat16)", mib(packed.file_bytes)),
            ("tokens per second", dense, f"{rates.get('packed', 0):.0f}"),
            ("perplexity", f"{text.reference_perplexity:.2f}", f"{text.perplexity:.2f}"),
            ("zeros in decoder matrices", "", f"{packed.sparsity:.1%}"),
            ("time to prune", "", f"{cost['seconds']:.0f} s"),
            ("peak memory", "", gib(cost["peak_resident_bytes"])),
        ]

    def places(self) -> list[Block]:
        """Where the files are, and what to try next."""
        folder = self.pruned.output
        assert folder is not None
        place = shlex.quote(str(folder))
        return next_steps(
            {
                "the packed model": folder,
                "its card": folder / "README.md",
                "the report": self.page.resolve(),
            },
            {
                "let it write": f"secateur generate {place} --prompt 'The capital of France is'",
                "time it in more ways": f"secateur bench {place}",
                "prune your own model": "secateur prune MODEL --sparsity 0.5 --compress int8 "
                "--output DIR",
                "plan it first": "secateur plan MODEL --sparsity 0.5",
            },
        )
