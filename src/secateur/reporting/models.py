"""What the verbs return that write a model: `prune`, `structure`, `train`, `chain`, `compress`,
`decompress`, `export`, `import` and `push`.

The tables about a record are also in the card of the model.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field

from secateur.models.hub import own_texts
from secateur.reporting.tables import (
    Block,
    Columns,
    Line,
    Result,
    Table,
    binary_size,
    by_layer,
    filled,
    layer_of,
    not_pruned,
)
from secateur.runs.records import (
    ChainStep,
    Compression,
    Counts,
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

COST = """
    time | {cost.seconds:.1f} s< on {environment[cpu]}, {environment[threads]} threads>
    peak memory | {cost.peak_resident_bytes:size}
"""
"""The rows of a table about a run that say what it took."""


def _commands(folder: Path, zeros: float | None = None) -> list[Block]:
    """Commands to try next, on a dense folder with this share of zeros or on a packed one."""
    from secateur.reporting import next_steps  # only a result that is shown names them

    if zeros is None:
        return next_steps.after_a_packed_folder(folder)
    return next_steps.after_a_dense_folder(folder, zeros)


def text_of(calibration: Mapping[str, Any] | None, model: str) -> str | None:
    """The calibration text, and whether the model brought it; None if there was none."""
    if not calibration:
        return None
    text, texts = str(calibration["source"]), own_texts(model)
    own = ", which the sample brings" * bool(texts and text == texts.calibrate)
    return f"{calibration['samples']} x {calibration['sequence_length']} tokens of {text}{own}"


def _text_of_run(manifest: Manifest) -> str | None:
    return text_of(manifest.calibration, manifest.source.name)


def _counted(words: Iterable[str]) -> str:
    """Words with their counts."""
    return ", ".join(f"{n} {word}" for word, n in Counter(words).most_common())


def _shortened(names: Sequence[str], shown: int = 4) -> str | None:
    """The number of names, and the first of them; None if there are none."""
    more = ", …" if len(names) > shown else ""
    return f"{len(names)}: {', '.join(names[:shown])}{more}" if names else None


# -- tables about records, which the card of the model has too -----------------------------------


def silent_experts(manifest: Manifest) -> str:
    """The experts that no calibration token reached; empty if there are none."""
    return by_layer((manifest.experts or {}).get("silent", {}))


PRUNED = """
    method | {method[name]}, {method[pattern]}
    allocation | {allocation[name]}
    zeros in decoder matrices | {result.decoder_sparsity:.2%}
    zeros in all parameters | {result.model_sparsity:.2%}
    not pruned | {left}
    planned memory | {plan[host_peak_bytes]:size}
    weight files | {result.file_bytes:size}
    calibration text | {text}
    pruned matrices | {reach[pruned]:,} of {reach[matrices]:,}
    fewest tokens of a matrix | {reach[fewest_tokens]:,}
    experts without tokens, dense | {silent}
    collapsed | {collapsed:words}
"""


def pruned(manifest: Manifest) -> list[Block]:
    """How a model was pruned."""
    own = {"left": not_pruned(manifest.left), "silent": silent_experts(manifest)}
    shown = {**dict(manifest), **own, "text": _text_of_run(manifest)}
    return [Table.about("pruned", PRUNED + COST, shown)]


COUNTED = {
    "parameters": "parameters",
    "decoder layers": "decoder",
    "attention": "attention",
    "feed-forward": "ffn",
    "experts": "experts",
    "embeddings and head": "embeddings",
    "KV cache, bytes per token": "kv_cache_bytes_per_token",
    "weight files": "file_bytes",
}
"""The rows of a table that compares two models, and their fields of `Counts`."""


def compared(title: str, before: Counts, after: Counts | None) -> Table:
    """A model before and after a cut; `after` is None if it is known only during the run."""
    rows = []
    for name, key in COUNTED.items():
        if then := getattr(before, key):
            form = binary_size if key == "file_bytes" else "{:,}".format
            now = getattr(after, key, None)
            left = ("", "") if now is None else (form(now), f"{now / then:.1%}")
            rows.append((name, form(then), *left))
    return Table.of(title, ("", "before", "after", "left"), rows)


STEPS = Columns("cut | chosen by | left of the decoder", "{step} | {by} | {left}", 2)
CUT = """
    time of a token before | {latency[milliseconds_before]:.2f} ms
    time of a token after | {latency[milliseconds_after]:.2f} ms
    measured with | {latency[dtype]}, {latency[threads]} threads, {latency[context_tokens]} tokens
    calibration text | {text}
    loads with | {loader}
"""


def cut(manifest: Manifest) -> list[Block]:
    """What a cut removed in total and in each step, and what it took."""
    structure = manifest.structure
    assert structure is not None

    def left(step: Mapping[str, Any]) -> str:
        share = f"{step['decoder_after'] / max(step['decoder_before'], 1):.1%}"
        return filled("{tokens_after:,} of {tokens_before:,} tokens", step) or share

    loader = "secateur, or trust_remote_code" if structure.varied else "plain transformers"
    own = {"latency": structure.latency, "text": _text_of_run(manifest), "loader": loader}
    return [
        compared("cut", structure.before, structure.after),
        Table.of_records("steps", structure.steps, STEPS, left=left),
        Table.about("", CUT + COST, {**dict(manifest), **own}),
    ]


TRAINED = """
    text | {recipe[text]:words}
    objective | {objective}
    learning rate | {learning_rate:.2g} at most, {optimizer}
    zeros in decoder matrices | {result[decoder_sparsity]:.2%}
    validation perplexity | {result[perplexity_before]:.3f} → {result[perplexity_after]:.3f}
    best weights | of step {result[best_step]}
    read | {result[tokens]:,} tokens in {result[step]:,} steps
    speed | {speed:,.0f} tokens/s
"""


def trained(training: Training) -> list[Block]:
    """What a training read, and what it brought."""
    speed = training.result["tokens"] / (training.cost.training_seconds or 1)
    return [Table.about("trained", TRAINED + COST, {**dict(training), "speed": speed})]


FORMATS = Columns(
    "format | matrices | size | bits per weight | of bfloat16",
    "{0[0]} | {0[1].matrices} | {0[1].bytes:size} | {0[1].bits_per_weight:.3f} | {0[1].ratio:.2%}",
)
PACKED = """
    weight files before | {source_bytes:size}
    as dense bfloat16 | {bfloat16_bytes:size}
    weight files now | {file_bytes:size}, {ratio:.2%} of bfloat16
    of them linear layers | {linears.bytes:size}, {linears.ratio:.2%} of bfloat16
    calibration text | {text}
    error of rounding | {rounding[mean_error]:.2g} of the linear layers' outputs, squared
    learned | {learned}
    loss of rounding | {lost:.2%} of the weights' norm
    time | {seconds:.1f} s
"""


def packed(record: Compression) -> list[Block]:
    """Sizes and formats of a compressed model."""
    stored = {**record.formats}
    if record.embeddings.matrices:
        stored[f"embeddings {record.embedding_values}"] = record.embeddings
    learned = record.rounding.get("distillation")
    own = {
        "text": text_of(record.rounding.get("calibration"), record.source),
        "learned": filled(LEARNED, {**learned, "from": Path(learned["teacher"]).name})
        if learned
        else None,
        "lost": record.value_error or None,
    }
    title = f"stored as ({record.sparsity:.2%} zeros in the linear layers)"
    return [
        Table.about("compressed", PACKED, {**dict(record), **own}),
        Table.of_records(title, stored.items(), FORMATS),
    ]


LEARNED = (
    "{tokens:,} tokens from {from}; distillation loss {loss_before:.4f} at first, {loss_after:.4f} "
    "at last"
)
LAYERS = Columns(
    "layer | matrices | zeros | patterns", "{0[0]} | {count} | {zeros:.2%} | {patterns}"
)
IMPORTED = """
    kind of source | {kind}
    matrices stored as | {stored}
    zeros in the decoder's matrices | {zeros}
    patterns | {patterns}
    stayed dense | {dense}
    stored without rounding | {exact}
    masks | {masks[name]}
    adapter | {adapter[name]} ({adapter[kind]})
    not part of the model | {lost}
    time | {seconds:.1f} s
"""


def imported(record: Import) -> list[Block]:
    """Where the zeros of an imported model are."""
    every = record.matrices
    dense = [x.name for x in every if x.pattern == "dense"]
    stored = [x for x in every if x.stored_as]
    exact = sum(not x.rounded for x in stored)
    own = {
        "stored": _counted(str(x.stored_as) for x in stored) or "plain tensors",
        "zeros": f"{record.sparsity:.2%}" if record.sparsity else "none: nothing has been pruned",
        "patterns": _counted(x.pattern for x in every),
        "dense": _shortened(dense) if len(dense) < len(every) else None,
        "exact": f"{exact} of {len(stored)} matrices" if stored else None,
        "lost": _shortened(record.dropped),
    }
    layers: dict[int, list[ImportedMatrix]] = {}
    for matrix in sorted(every, key=lambda x: layer_of(x.name)):
        layers.setdefault(layer_of(matrix.name), []).append(matrix)
    return [
        Table.about("imported", IMPORTED, {**dict(record), **own}),
        *(Line(f"note: {note}") for note in record.notes),
        Table.of_records(
            "decoder layers",
            layers.items(),
            LAYERS,
            count=lambda x: len(x[1]),
            zeros=lambda x: sum(m.zeros for m in x[1]) / sum(prod(m.shape) for m in x[1]),
            patterns=lambda x: _counted(m.pattern for m in x[1]),
        ),
    ]


# -- results -------------------------------------------------------------------------------------


class CompressResult(Result, Compression):
    """The record of a compression: sizes before and after."""

    source: str = Field("", exclude=True)

    @property
    def parameters(self) -> int:
        """Number of parameters in the source's weight files."""
        return self.bfloat16_bytes // BFLOAT16_BYTES

    def blocks(self) -> Sequence[Block]:
        """Sizes and formats, and where the result is."""
        return [*packed(self), *_commands(self.output)]


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
        rows = """
            weight files before | {source_bytes:size}
            weight files now | {file_bytes:size}
            matrices unpacked | {matrices}
            time | {seconds:.1f} s
            output | {output}
        """
        return [Table.about("decompressed", rows, self)]


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
            layers, left = ([one.to_json() for one in own] for own in (self.layers, self.left))
            return {"sparsity": self.sparsity, "layers": layers, "left": left}
        packed = {} if self.compression is None else {"compression": self.compression.to_json()}
        return {"output": str(self.output), **self.manifest.to_json(), **packed}

    def blocks(self) -> Sequence[Block]:
        """One table, and the tables of the compression if there was one."""
        if self.manifest is None or self.output is None:
            rows = [("zeros in decoder matrices", f"{self.sparsity:.2%}")]
            return [Table.facts("pruned in place", [*rows, ("not pruned", not_pruned(self.left))])]
        following = self.compression.blocks() if self.compression else None
        return [*pruned(self.manifest), *(following or _commands(self.output, self.sparsity))]


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
        return [*cut(self.manifest), *_commands(self.output, zeros)]


def _result(name: str, doc: str) -> property:
    """A number of the result of a training."""
    return property(lambda self: self.manifest.result[name], doc=doc)


@dataclass(frozen=True, repr=False)
class TrainResult(_WrittenModel):
    """The result of a training.

    Attributes:
        output: the output folder.
        manifest: versions, hardware, text, choices, cost and result.
    """

    output: Path
    manifest: Training

    sparsity = _result("decoder_sparsity", "The fraction of zeros in the decoder's matrices.")
    steps = _result("step", "Optimizer steps.")
    tokens = _result("tokens", "Tokens that the model read.")
    perplexity_before = _result("perplexity_before", "Of the validation windows; None without any.")
    perplexity_after = _result("perplexity_after", "The same, of the weights that were kept.")

    def blocks(self) -> Sequence[Block]:
        """One table, and what to try next."""
        return [*trained(self.manifest), *_commands(self.output, self.sparsity)]


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
        first, last = self.links[0], self.links[-1]
        table = Table.of_records(
            "chain",
            self.links,
            LINKS,
            left=lambda x: x.kept / first.kept,
            size=lambda x: x.file_bytes / first.file_bytes,
        )
        return [table, *_commands(self.output, None if last.step == "compress" else last.zeros)]


LINKS = Columns(
    "after | parameters | not zero | left | weight files | left | time",
    "{step} | {parameters:,} | {kept:,} | {left:.1%} | {file_bytes:size} | {size:.1%} | "
    "{seconds:.0f} s",
)


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
        rows = [
            ("files", ", ".join(str(self.output / name) for name in self.files)),
            ("size", binary_size(made.file_bytes)),
            ("tensors", ", ".join(f"{n} {name}" for name, n in sorted(made.types.items()))),
            ("zeros in the matrices", f"{made.zeros / max(made.weights, 1):.2%}"),
            ("zeros kept exactly", f"{made.zeros_kept:,} of {made.zeros:,}"),
            ("time", f"{self.seconds:.1f} s"),
            *(("note", note) for note in made.notes),
        ]
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
        return dict(Counter(x.pattern for x in self.record.matrices).most_common())

    @property
    def rounded(self) -> list[str]:
        """The matrices whose exact values the dtype of the model cannot hold."""
        return [x.name for x in self.record.matrices if x.rounded]

    def to_json(self) -> dict[str, Any]:
        """The folder and the record."""
        record = self.record.to_json()
        found = {name: record.pop(name) for name in ("sparsity", "matrices")}
        own = {"output": str(self.output), "parameters": self.parameters}
        return {**own, "patterns": self.patterns, **record, **found}

    def blocks(self) -> Sequence[Block]:
        """What was found, then all layers."""
        return [*imported(self.record), *_commands(self.output, self.sparsity)]


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
        rows = """
            repository | {repo} ({kind})
            branch | {on}
            zeros in the decoder's matrices | {zeros:.2%}
            size | {total:size}
            left out | {left_out:words}
            note | {notes}
            sent | {sent}
        """
        own = {
            "kind": "private" if self.private else "public",
            "on": self.branch or "main",
            "total": sum(self.files.values()),
            "notes": "\n".join(self.notes),
            "sent": self.address or "nothing: this was a dry run",
        }
        files = [(name, f"{size:,}") for name, size in self.files.items()]
        title = "published" if self.address else "would be published"
        card = [] if self.address else [Line(self.card)]
        about = Table.about(title, rows, {**vars(self), **own})
        return [about, Table.of("files", ("name", "bytes"), files), *card]
