"""What the verbs return that write a dense model: `prune`, `structure`, `train`, `chain`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from secateur.reporting.results.compress import CompressResult
from secateur.reporting.results.next_steps import after_a_dense_folder, after_a_packed_folder
from secateur.reporting.tables import Block, Result, Table, binary_size, by_layer, not_pruned
from secateur.runs.records import ChainStep, Layer, Manifest, SkippedMatrix, Structure, Training


@dataclass(frozen=True, repr=False)
class PruneResult(Result):
    """The result of a pruning run.

    Attributes:
        sparsity: fraction of zeros in the matrices of the decoder layers.
        layers: a record for each decoder layer, as in `layers.jsonl`.
        manifest: versions, hardware, choices, cost and result; None for a loaded model.
        output: the output folder; None for a loaded model.
        left: matrices that were not pruned, and the reasons.
        compression: the result of compressing, if the model was compressed.
    """

    sparsity: float
    layers: list[Layer]
    manifest: Manifest | None = None
    output: Path | None = None
    left: list[SkippedMatrix] = field(default_factory=list)
    compression: CompressResult | None = None

    def to_json(self) -> dict[str, Any]:
        """The folder and its manifest; for a loaded model sparsity, layers and what was left."""
        if self.manifest is None:
            left = [one.to_json() for one in self.left]
            layers = [layer.to_json() for layer in self.layers]
            return {"sparsity": self.sparsity, "layers": layers, "left": left}
        packed = {} if self.compression is None else {"compression": self.compression.to_json()}
        return {"output": str(self.output), **self.manifest.to_json(), **packed}

    def blocks(self) -> Sequence[Block]:
        """One table, and the tables of the compression if there was one."""
        if self.manifest is None or self.output is None:
            rows = [
                ("zeros in decoder matrices", f"{self.sparsity:.2%}"),
                ("not pruned", not_pruned(self.left)),
            ]
            return [Table.facts("pruned in place", rows)]
        manifest, method, cost = self.manifest, self.manifest.method, self.manifest.cost
        rows = [
            ("method", f"{method['name']}, {method['pattern']}"),
            ("allocation", manifest.allocation["name"]),
            ("zeros in decoder matrices", f"{manifest.result.decoder_sparsity:.2%}"),
            ("zeros in all parameters", f"{manifest.result.model_sparsity:.2%}"),
            ("not pruned", not_pruned(self.left)),
            ("time", f"{cost.seconds:.1f} s"),
            ("peak memory", binary_size(cost.peak_resident_bytes)),
            ("planned memory", binary_size(manifest.plan["host_peak_bytes"])),
            ("weight files", binary_size(manifest.result.file_bytes)),
        ]
        rows += _reach_rows(manifest)
        if manifest.collapsed:
            rows.append(("collapsed", ", ".join(manifest.collapsed)))
        pruned = Table.facts("pruned", [*rows, ("output", str(self.output))])
        if self.compression is not None:
            return [pruned, *self.compression.blocks()]
        return [pruned, *after_a_dense_folder(self.output, self.sparsity)]


def _reach_rows(manifest: Manifest) -> list[tuple[str, str]]:
    """How far calibration reached, and the experts that it did not reach."""
    reach, rows = manifest.reach, []
    if reach.get("fewest_tokens") is not None:
        rows.append(
            (
                "calibrated",
                f"{reach['pruned']:,} of {reach['matrices']:,} matrices, with "
                f"{reach['fewest_tokens']:,} tokens or more",
            )
        )
    silent = by_layer((manifest.experts or {}).get("silent", {}))
    return [*rows, ("experts without tokens", f"left dense: {silent}")] if silent else rows


@dataclass(frozen=True, repr=False)
class StructureResult(Result):
    """The result of a structured cut.

    Attributes:
        manifest: choices, steps, cost and result.
        output: the output folder.
    """

    manifest: Manifest
    output: Path

    def to_json(self) -> dict[str, Any]:
        """The folder and its manifest."""
        return {"output": str(self.output), **self.manifest.to_json()}

    @property
    def structure(self) -> Structure:
        """What the cut removed."""
        assert self.manifest.structure is not None
        return self.manifest.structure

    def blocks(self) -> Sequence[Block]:
        """What the cut removed in total and in each step, and what to try next."""
        zeros = self.manifest.result.decoder_sparsity
        tables = [self.removed(), self.steps(), self.cost()]
        return [*tables, *after_a_dense_folder(self.output, zeros)]

    def removed(self) -> Table:
        """The model before and after."""
        before, after, latency = self.structure.before, self.structure.after, self.structure.latency

        def line(what: str, key: str) -> tuple[str, str, str, str]:
            then, now = getattr(before, key), getattr(after, key)
            return what, f"{then:,}", f"{now:,}", f"{share(then, now):.1%}"

        rows = [
            line("parameters", "parameters"),
            line("decoder layers", "decoder"),
            line("attention", "attention"),
            line("feed-forward", "ffn"),
            line("embeddings and head", "embeddings"),
            line("KV cache, bytes per token", "kv_cache_bytes_per_token"),
        ]
        if before.experts:
            rows.insert(4, line("experts", "experts"))
        size = share(before.file_bytes, after.file_bytes)
        rows.append(
            (
                "weight files",
                binary_size(before.file_bytes),
                binary_size(after.file_bytes),
                f"{size:.1%}",
            )
        )
        if latency:
            then, now = (latency[f"milliseconds_{when}"] for when in ("before", "after"))
            rows.append(
                ("time per token, measured", f"{then:.2f} ms", f"{now:.2f} ms", f"{now / then:.1%}")
            )
        return Table.of("cut", ("", "before", "after", "left"), rows)

    def steps(self) -> Table:
        """The part of the decoder, or the tokens, that each step kept."""
        rows = [(x["step"], x["by"], _left_of(x)) for x in self.structure.steps]
        return Table.of("steps", ("cut", "chosen by", "left of the decoder"), rows, numbers=2)

    def cost(self) -> Table:
        """What reads the result, the cost of the cut, and the output folder."""
        cost = self.manifest.cost
        rows = [
            (
                "loads with",
                "secateur, or trust_remote_code" if self.structure.varied else "plain transformers",
            ),
            ("time", f"{cost.seconds:.1f} s"),
            ("peak memory", binary_size(cost.peak_resident_bytes)),
            ("output", str(self.output)),
        ]
        return Table.facts("", rows)


def share(before: int, after: int) -> float:
    """The kept share of a number."""
    return after / before if before else 1.0


def _left_of(step: Mapping[str, Any]) -> str:
    """What a step left, in words."""
    if "tokens_after" in step:
        return f"{step['tokens_after']:,} of {step['tokens_before']:,} tokens"
    return f"{_step_share(step):.1%}"


def _step_share(step: Mapping[str, Any]) -> float:
    """The share of the decoder that a step kept."""
    return share(step["decoder_before"], step["decoder_after"])


@dataclass(frozen=True, repr=False)
class TrainResult(Result):
    """The result of a training.

    Attributes:
        output: the output folder.
        manifest: versions, hardware, text, choices, cost and result.
    """

    output: Path
    manifest: Training

    @property
    def sparsity(self) -> float:
        """Fraction of zeros in the matrices of the decoder layers, counted in the files."""
        return float(self.manifest.result["decoder_sparsity"])

    @property
    def steps(self) -> int:
        """Optimizer steps."""
        return int(self.manifest.result["step"])

    @property
    def tokens(self) -> int:
        """Tokens that the model read."""
        return int(self.manifest.result["tokens"])

    @property
    def perplexity_before(self) -> float | None:
        """Validation perplexity before the training; None without validation."""
        return self.manifest.result["perplexity_before"]

    @property
    def perplexity_after(self) -> float | None:
        """Validation perplexity of the weights that were kept."""
        return self.manifest.result["perplexity_after"]

    def to_json(self) -> dict[str, Any]:
        """The folder and the manifest of this training."""
        return {"output": str(self.output), **self.manifest.to_json()}

    def blocks(self) -> Sequence[Block]:
        """One table."""
        cost = self.manifest.cost
        seconds = cost.training_seconds or 0.0
        rows = [
            ("objective", self.manifest.objective),
            ("zeros in decoder matrices", f"{self.sparsity:.2%}"),
            ("read", f"{self.tokens:,} tokens in {self.steps:,} steps"),
            ("time", f"{seconds:.1f} s, {self.tokens / seconds:,.0f} tokens/s"),
            ("peak memory", binary_size(cost.peak_resident_bytes)),
            ("output", str(self.output)),
        ]
        if self.perplexity_after is not None:
            change = f"{self.perplexity_before:.3f} → {self.perplexity_after:.3f}"
            rows.insert(
                2,
                ("validation perplexity", f"{change} at step {self.manifest.result['best_step']}"),
            )
        return [Table.facts("trained", rows), *after_a_dense_folder(self.output, self.sparsity)]


@dataclass(frozen=True, repr=False)
class ChainResult(Result):
    """The model after each step of a chain.

    Attributes:
        links: the model at the start, and after each step.
        output: the output folder.
    """

    links: tuple[ChainStep, ...]
    output: Path

    def to_json(self) -> dict[str, Any]:
        """All fields."""
        return {"links": [link.to_json() for link in self.links], "output": str(self.output)}

    def blocks(self) -> Sequence[Block]:
        """Sizes after each step, and where the result is."""
        first = self.links[0]
        rows = [
            (
                link.step,
                f"{link.parameters:,}",
                f"{link.kept:,}",
                f"{link.kept / first.kept:.1%}",
                binary_size(link.file_bytes),
                f"{link.file_bytes / first.file_bytes:.1%}",
                f"{link.seconds:.0f} s",
            )
            for link in self.links
        ]
        columns = ("after", "parameters", "not zero", "left", "weight files", "left", "time")
        return [
            Table.of("chain", columns, rows),
            Table.facts("", [("output", str(self.output))]),
            *self.next_steps(),
        ]

    def next_steps(self) -> list[Block]:
        """Commands for the folder that the last step made."""
        if self.links[-1].step == "compress":
            return after_a_packed_folder(self.output)
        return after_a_dense_folder(self.output, self.links[-1].zeros)
