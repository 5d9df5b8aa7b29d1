"""What the verbs return that write a model: `prune`, `structure`, `train`, `chain`, `compress`,
`decompress`, `export`, `import` and `push`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field

from secateur.models.hub import own_texts
from secateur.reporting.tables import (
    Block,
    Line,
    Result,
    Table,
    binary_size,
    by_layer,
    layer_of,
    not_pruned,
)
from secateur.runs.records import (
    ChainStep,
    Compression,
    Import,
    ImportedMatrix,
    Layer,
    Manifest,
    SkippedMatrix,
    Structure,
    Training,
)
from secateur.runs.records.run import BFLOAT16_BYTES

if TYPE_CHECKING:
    from secateur.exporting import Exported


def _commands(folder: Path, zeros: float | None = None) -> list[Block]:
    """Commands to try next, on a dense folder with this share of zeros or on a packed one."""
    from secateur.reporting import next_steps  # only a result that is shown names them

    if zeros is None:
        return next_steps.after_a_packed_folder(folder)
    return next_steps.after_a_dense_folder(folder, zeros)


def _text_of(calibration: Mapping[str, Any] | None, model: str) -> str | None:
    """The calibration text, and whether the model brought it; None if there was none."""
    if not calibration:
        return None
    text, texts = str(calibration["source"]), own_texts(model)
    own = ", which the sample brings" * bool(texts and text == texts.calibrate)
    return f"{calibration['samples']} x {calibration['sequence_length']} tokens of {text}{own}"


class CompressResult(Result, Compression):
    """The record of a compression: sizes before and after."""

    source: str = Field("", exclude=True)

    @property
    def parameters(self) -> int:
        """Number of parameters in the source's weight files."""
        return self.bfloat16_bytes // BFLOAT16_BYTES

    @property
    def learned(self) -> str | None:
        """What the rounded model learned before it was packed, if it did."""
        found = self.rounding.get("distillation")
        return found and (
            f"{found['tokens']:,} tokens from {Path(found['teacher']).name}; distillation loss "
            f"{found['loss_before']:.4f} at first, {found['loss_after']:.4f} at last"
        )

    def blocks(self) -> Sequence[Block]:
        """Sizes and formats, and where the result is."""
        sizes = [
            ("weight files before", binary_size(self.source_bytes), ""),
            ("as dense bfloat16", binary_size(self.bfloat16_bytes), "100 %"),
            ("weight files now", binary_size(self.file_bytes), f"{self.ratio:.2%}"),
            ("of them linear layers", binary_size(self.linears.bytes), f"{self.linears.ratio:.2%}"),
        ]
        stored = {**self.formats}
        if self.embeddings.matrices:
            stored[f"embeddings {self.embedding_values}"] = self.embeddings
        columns = ("format", "matrices", "size", "bits per weight", "of bfloat16")
        formats = [
            (n, str(x.matrices), binary_size(x.bytes), f"{x.bits_per_weight:.3f}", f"{x.ratio:.2%}")
            for n, x in stored.items()
        ]
        error = self.rounding.get("mean_error")
        lost, squared = "of the weights' norm", "of the linear layers' outputs, squared"
        closing = [
            ("calibration text", _text_of(self.rounding.get("calibration"), self.source)),
            ("error of rounding", None if error is None else f"{error:.2g} {squared}"),
            ("learned", self.learned),
            ("loss of rounding", f"{self.value_error:.2%} {lost}" if self.value_error else None),
            ("time", f"{self.seconds:.1f} s"),
            ("output", str(self.output)),
        ]
        return [
            Table.of("compressed", ("", "size", "of bfloat16"), sizes),
            Table.of(
                f"stored as ({self.sparsity:.2%} zeros in the linear layers)", columns, formats
            ),
            Table.facts("", closing),
            *_commands(self.output),
        ]


def stored_as(layout: Mapping[str, Any]) -> str:
    """How a layout stores a matrix, in a few words: `2:4 int4 g64` has groups of 64."""
    kind = f"{layout.get('pattern', layout['format'])} {layout['values']}"
    return f"{kind} g{layout['group']}" if "group" in layout else kind


@dataclass(frozen=True, repr=False)
class DecompressResult(Result):
    """Sizes before and after decompression.

    Attributes:
        output: the output folder.
        source_bytes: size of the compressed weight files.
        file_bytes: size of the written dense files.
        matrices: number of unpacked matrices.
        seconds: wall time.
    """

    output: Path
    source_bytes: int
    file_bytes: int
    matrices: int
    seconds: float

    def blocks(self) -> Sequence[Block]:
        """One table."""
        rows = [
            ("weight files before", binary_size(self.source_bytes)),
            ("weight files now", binary_size(self.file_bytes)),
            ("matrices unpacked", str(self.matrices)),
            ("time", f"{self.seconds:.1f} s"),
            ("output", str(self.output)),
        ]
        return [Table.facts("decompressed", rows)]


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
        reach, silent = manifest.reach, by_layer((manifest.experts or {}).get("silent", {}))
        calibrated = None
        if (fewest := reach.get("fewest_tokens")) is not None:
            pruned = f"{reach['pruned']:,} of {reach['matrices']:,} matrices"
            calibrated = f"{pruned}, with {fewest:,} tokens or more"
        facts = [
            ("method", f"{method['name']}, {method['pattern']}"),
            ("allocation", manifest.allocation["name"]),
            ("zeros in decoder matrices", f"{manifest.result.decoder_sparsity:.2%}"),
            ("zeros in all parameters", f"{manifest.result.model_sparsity:.2%}"),
            ("not pruned", not_pruned(self.left)),
            ("time", f"{cost.seconds:.1f} s"),
            ("peak memory", binary_size(cost.peak_resident_bytes)),
            ("planned memory", binary_size(manifest.plan["host_peak_bytes"])),
            ("weight files", binary_size(manifest.result.file_bytes)),
            ("calibration text", _text_of(manifest.calibration, manifest.source.name)),
            ("calibrated", calibrated),
            ("experts without tokens", f"left dense: {silent}" if silent else None),
            ("collapsed", ", ".join(manifest.collapsed) or None),
            ("output", str(self.output)),
        ]
        if self.compression is not None:
            return [Table.facts("pruned", facts), *self.compression.blocks()]
        return [Table.facts("pruned", facts), *_commands(self.output, self.sparsity)]


class _WrittenModel(Result):
    """A folder and its record."""

    manifest: Manifest | Training
    output: Path

    def to_json(self) -> dict[str, Any]:
        """The folder and the record."""
        return {"output": str(self.output), **self.manifest.to_json()}


@dataclass(frozen=True, repr=False)
class StructureResult(_WrittenModel):
    """The result of a structured cut.

    Attributes:
        manifest: choices, steps, cost and result.
        output: the output folder.
    """

    manifest: Manifest
    output: Path

    @property
    def structure(self) -> Structure:
        """What the cut removed."""
        assert self.manifest.structure is not None
        return self.manifest.structure

    def blocks(self) -> Sequence[Block]:
        """What the cut removed in total and in each step, and what to try next."""
        zeros = self.manifest.result.decoder_sparsity
        tables = [self.removed(), self.steps(), self.cost()]
        return [*tables, *_commands(self.output, zeros)]

    def removed(self) -> Table:
        """The model before and after."""
        before, after, latency = self.structure.before, self.structure.after, self.structure.latency

        def line(what: str, key: str) -> tuple[str, str, str, str]:
            then, now = getattr(before, key), getattr(after, key)
            return what, f"{then:,}", f"{now:,}", f"{_share(then, now):.1%}"

        sizes = (before.file_bytes, after.file_bytes)
        rows = [
            line("parameters", "parameters"),
            line("decoder layers", "decoder"),
            line("attention", "attention"),
            line("feed-forward", "ffn"),
            *([line("experts", "experts")] if before.experts else []),
            line("embeddings and head", "embeddings"),
            line("KV cache, bytes per token", "kv_cache_bytes_per_token"),
            ("weight files", *map(binary_size, sizes), f"{_share(*sizes):.1%}"),
        ]
        if latency:
            then, now = (latency[f"milliseconds_{when}"] for when in ("before", "after"))
            left = f"{now / then:.1%}"
            rows.append(("time per token, measured", f"{then:.2f} ms", f"{now:.2f} ms", left))
        return Table.of("cut", ("", "before", "after", "left"), rows)

    def steps(self) -> Table:
        """The part of the decoder, or the tokens, that each step kept."""

        def left(step: Mapping[str, Any]) -> str:
            if "tokens_after" in step:
                return f"{step['tokens_after']:,} of {step['tokens_before']:,} tokens"
            return f"{_share(step['decoder_before'], step['decoder_after']):.1%}"

        rows = [(x["step"], x["by"], left(x)) for x in self.structure.steps]
        return Table.of("steps", ("cut", "chosen by", "left of the decoder"), rows, numbers=2)

    def cost(self) -> Table:
        """What reads the result, the cost of the cut, and the output folder."""
        cost = self.manifest.cost
        own = "secateur, or trust_remote_code"
        rows = [
            ("calibration text", _text_of(self.manifest.calibration, self.manifest.source.name)),
            ("loads with", own if self.structure.varied else "plain transformers"),
            ("time", f"{cost.seconds:.1f} s"),
            ("peak memory", binary_size(cost.peak_resident_bytes)),
            ("output", str(self.output)),
        ]
        return Table.facts("", rows)


def _share(before: int, after: int) -> float:
    """The kept share of a number."""
    return after / before if before else 1.0


@dataclass(frozen=True, repr=False)
class TrainResult(_WrittenModel):
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

    def blocks(self) -> Sequence[Block]:
        """One table."""
        cost, change = self.manifest.cost, None
        seconds = cost.training_seconds or 0.0
        if self.perplexity_after is not None:
            change = f"{self.perplexity_before:.3f} → {self.perplexity_after:.3f}"
            change += f" at step {self.manifest.result['best_step']}"
        rows = [
            ("text", ", ".join(self.manifest.recipe.get("text", ())) or None),
            ("objective", self.manifest.objective),
            ("zeros in decoder matrices", f"{self.sparsity:.2%}"),
            ("validation perplexity", change),
            ("read", f"{self.tokens:,} tokens in {self.steps:,} steps"),
            ("time", f"{seconds:.1f} s, {self.tokens / seconds:,.0f} tokens/s"),
            ("peak memory", binary_size(cost.peak_resident_bytes)),
            ("output", str(self.output)),
        ]
        return [Table.facts("trained", rows), *_commands(self.output, self.sparsity)]


@dataclass(frozen=True, repr=False)
class ChainResult(Result):
    """The model after each step of a chain.

    Attributes:
        links: the model at the start, and after each step.
        output: the output folder.
    """

    links: tuple[ChainStep, ...]
    output: Path

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
        place, last = Table.facts("", [("output", str(self.output))]), self.links[-1]
        following = _commands(self.output, None if last.step == "compress" else last.zeros)
        return [Table.of("chain", columns, rows), place, *following]


@dataclass(frozen=True, repr=False)
class ExportResult(Result):
    """The files of an export.

    Attributes:
        target: the name of the target.
        type: how matrices are stored.
        output: the folder of the files.
        files: their names.
        exported: sizes, types and zeros.
        seconds: wall time.
    """

    target: str
    type: str
    output: Path
    files: tuple[str, ...]
    exported: Exported
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """All numbers."""
        fields = super().to_json()
        made, seconds = fields.pop("exported"), fields.pop("seconds")
        return {**fields, **made, "seconds": seconds}

    def blocks(self) -> Sequence[Block]:
        """One table, then the notes."""
        made = self.exported
        types = ", ".join(f"{count} {name}" for name, count in sorted(made.types.items()))
        share = made.zeros / made.weights if made.weights else 0.0
        rows = [
            ("files", ", ".join(str(self.output / name) for name in self.files)),
            ("size", binary_size(made.file_bytes)),
            ("tensors", types),
            ("zeros in the matrices", f"{share:.2%}"),
            ("zeros kept exactly", f"{made.zeros_kept:,} of {made.zeros:,}"),
            ("time", f"{self.seconds:.1f} s"),
        ]
        rows += [("note", note) for note in made.notes]
        return [Table.facts(f"exported to {self.target}, {self.type}", rows)]


@dataclass(frozen=True, repr=False)
class ImportResult(Result):
    """Where the zeros of an imported model are.

    Attributes:
        output: the folder of the model.
        record: where the model came from, and each matrix.
        parameters: of the whole model.
    """

    output: Path
    record: Import
    parameters: int

    @property
    def sparsity(self) -> float:
        """Fraction of zeros among the matrices of the decoder layers."""
        return self.record.sparsity

    @property
    def patterns(self) -> dict[str, int]:
        """The number of matrices with each pattern; `dense` has no zeros worth mentioning."""
        return dict(Counter(matrix.pattern for matrix in self.record.matrices).most_common())

    @property
    def dense(self) -> tuple[str, ...]:
        """The matrices that have no zeros."""
        return tuple(x.name for x in self.record.matrices if x.pattern == "dense")

    @property
    def rounded(self) -> tuple[str, ...]:
        """The matrices whose exact values the dtype of the model cannot hold."""
        return tuple(x.name for x in self.record.matrices if x.rounded)

    def to_json(self) -> dict[str, Any]:
        """The folder and the record."""
        record = self.record.to_json()
        found = {name: record.pop(name) for name in ("sparsity", "matrices")}
        own = {"output": str(self.output), "parameters": self.parameters}
        return {**own, "patterns": self.patterns, **record, **found}

    def facts(self) -> list[tuple[str, str]]:
        """What was found, as names and values."""
        record, dense = self.record, self.dense
        stored = Counter(x.stored_as for x in record.matrices if x.stored_as)
        exact = sum(1 for x in record.matrices if x.stored_as and not x.rounded)
        rounding = f"{exact} of {stored.total()} matrices" if stored else None
        adapter = record.adapter
        rows = [
            ("kind of source", record.kind),
            ("matrices stored as", _counted(stored) or "plain tensors"),
            (
                "zeros in the decoder's matrices",
                f"{record.sparsity:.2%}" if record.sparsity else "none: nothing has been pruned",
            ),
            ("patterns", _counted(self.patterns)),
            ("stayed dense", _shortened(dense) if len(dense) < len(record.matrices) else None),
            ("stored without rounding", rounding),
            ("masks", record.masks and record.masks["name"]),
            ("adapter", adapter and f"{adapter['name']} ({adapter['kind']})"),
            ("not part of the model", _shortened(record.dropped)),
            *(("note", note) for note in record.notes),
            ("time", f"{record.seconds:.1f} s"),
        ]
        return [(name, value) for name, value in rows if value is not None]

    def layers(self) -> Table:
        """A line for each decoder layer."""
        by_layer: dict[int, list[ImportedMatrix]] = {}
        for matrix in self.record.matrices:
            by_layer.setdefault(layer_of(matrix.name), []).append(matrix)
        rows = []
        for index, matrices in sorted(by_layer.items()):
            weights = sum(prod(x.shape) for x in matrices)
            share = sum(x.zeros for x in matrices) / weights
            found = _counted(Counter(x.pattern for x in matrices))
            rows.append((str(index), str(len(matrices)), f"{share:.2%}", found))
        return Table.of("decoder layers", ("layer", "matrices", "zeros", "patterns"), rows)

    def blocks(self) -> Sequence[Block]:
        """What was found, then all layers."""
        following = _commands(self.output, self.sparsity)
        return [Table.facts("imported", self.facts()), self.layers(), *following]


def _counted(counts: dict[Any, int] | Counter[Any]) -> str:
    """Words with their counts."""
    return ", ".join(f"{count} {word}" for word, count in counts.items())


def _shortened(names: Sequence[str], shown: int = 4) -> str | None:
    """The number of names, and the first of them; None if there are none."""
    more = ", …" if len(names) > shown else ""
    return f"{len(names)}: {', '.join(names[:shown])}{more}" if names else None


@dataclass(frozen=True, repr=False)
class PushResult(Result):
    """What was published, or would be.

    Attributes:
        repo: the repository.
        private: whether it is private.
        branch: the branch; None for the main one.
        files: sizes in bytes by name.
        left_out: files of the folder that are not published.
        zeros: the fraction of zeros found in the decoder's matrices.
        card: the text of the card.
        notes: what a user must know, one sentence each.
        address: of the commit; None if nothing was sent.
    """

    repo: str
    private: bool
    branch: str | None
    files: Mapping[str, int]
    left_out: tuple[str, ...]
    zeros: float
    card: str
    notes: tuple[str, ...]
    address: str | None

    def to_json(self) -> dict[str, Any]:
        """Everything."""
        return {**super().to_json(), "total_bytes": sum(self.files.values())}

    def blocks(self) -> Sequence[Block]:
        """What it is, the files, and for a dry run the card."""
        rows = [
            ("repository", f"{self.repo} ({'private' if self.private else 'public'})"),
            ("branch", self.branch or "main"),
            ("zeros in the decoder's matrices", f"{self.zeros:.2%}"),
            ("size", binary_size(sum(self.files.values()))),
            ("left out", ", ".join(self.left_out) or "nothing"),
            *(("note", note) for note in self.notes),
            ("sent", self.address or "nothing: this was a dry run"),
        ]
        files = [(name, f"{size:,}") for name, size in self.files.items()]
        shown: list[Block] = [
            Table.facts("published" if self.address else "would be published", rows),
            Table.of("files", ("name", "bytes"), files),
        ]
        return shown if self.address else [*shown, Line(self.card)]
