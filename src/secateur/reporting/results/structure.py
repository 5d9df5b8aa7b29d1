"""What `structure` returns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from secateur.reporting.results.next_steps import after_a_dense_folder
from secateur.reporting.results.result import Result
from secateur.reporting.tables import Block, Table
from secateur.reporting.wording import binary_size


@dataclass(frozen=True, repr=False)
class StructureResult(Result):
    """The result of a structured cut.

    Attributes:
        manifest: choices, steps, cost and result.
        output: the output folder.
    """

    manifest: dict[str, Any]
    output: Path

    def to_json(self) -> dict[str, Any]:
        """The folder and its manifest."""
        return {"output": str(self.output), **self.manifest}

    def blocks(self) -> Sequence[Block]:
        """What the cut removed in total and in each step, and what to try next."""
        zeros = self.manifest["result"]["decoder_sparsity"]
        tables = [self.removed(), self.steps(), self.cost()]
        return [*tables, *after_a_dense_folder(self.output, zeros)]

    def removed(self) -> Table:
        """The model before and after."""
        cut = self.manifest["structure"]
        before, after = cut["before"], cut["after"]

        def line(what: str, key: str) -> tuple[str, str, str, str]:
            return (
                what,
                f"{before[key]:,}",
                f"{after[key]:,}",
                f"{share(before[key], after[key]):.1%}",
            )

        rows = [
            line("parameters", "parameters"),
            line("decoder layers", "decoder"),
            line("attention", "attention"),
            line("feed-forward", "ffn"),
            line("embeddings and head", "embeddings"),
            line("KV cache, bytes per token", "kv_cache_bytes_per_token"),
        ]
        if before["experts"]:
            rows.insert(4, line("experts", "experts"))
        size = share(before["file_bytes"], after["file_bytes"])
        rows.append(
            (
                "weight files",
                binary_size(before["file_bytes"]),
                binary_size(after["file_bytes"]),
                f"{size:.1%}",
            )
        )
        if cut.get("latency"):
            then, now = (cut["latency"][f"milliseconds_{when}"] for when in ("before", "after"))
            rows.append(
                ("time per token, measured", f"{then:.2f} ms", f"{now:.2f} ms", f"{now / then:.1%}")
            )
        return Table.of("cut", ("", "before", "after", "left"), rows)

    def steps(self) -> Table:
        """The part of the decoder, or the tokens, that each step kept."""
        rows = [(x["step"], x["by"], left_of(x)) for x in self.manifest["structure"]["steps"]]
        return Table.of("steps", ("cut", "chosen by", "left of the decoder"), rows, numbers=2)

    def cost(self) -> Table:
        """What reads the result, the cost of the cut, and the output folder."""
        cut, cost = self.manifest["structure"], self.manifest["cost"]
        rows = [
            (
                "loads with",
                "secateur, or trust_remote_code" if cut["varied"] else "plain transformers",
            ),
            ("time", f"{cost['seconds']:.1f} s"),
            ("peak memory", binary_size(cost["peak_resident_bytes"])),
            ("output", str(self.output)),
        ]
        return Table.facts("", rows)


def share(before: int, after: int) -> float:
    """The kept share of a number."""
    return after / before if before else 1.0


def left_of(step: Mapping[str, Any]) -> str:
    """What a step left, in words."""
    if "tokens_after" in step:
        return f"{step['tokens_after']:,} of {step['tokens_before']:,} tokens"
    return f"{step_share(step):.1%}"


def step_share(step: Mapping[str, Any]) -> float:
    """The share of the decoder that a step kept."""
    return share(step["decoder_before"], step["decoder_after"])
