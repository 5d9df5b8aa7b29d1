"""What the verbs return that write a model.

The card of a model shows the same tables about its record.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from math import prod
from pathlib import Path
from typing import Any, ClassVar

from pydantic import Field, InstanceOf

from secateur.exporting import Exported
from secateur.models.hub import own_texts
from secateur.reporting.fields import Result, blocks_of, filled
from secateur.reporting.tables import Block, Table, binary_size, layer_of
from secateur.runs import records
from secateur.runs.records import BFLOAT16_BYTES


def _commands(folder: Path, zeros: float | None = None) -> list[Block]:
    """Commands to try next, on a dense folder with this share of zeros or on a packed one."""
    from secateur.reporting import next_steps  # only a result that is shown names them

    return next_steps.after(folder, zeros)


def _text_of(calibration: Mapping[str, Any] | None, model: str) -> str | None:
    """The calibration text, and whether the model brought it; None if there was none."""
    if not calibration:
        return None
    text, texts = str(calibration["source"]), own_texts(model)
    own = ", which the sample brings" * bool(texts and text == texts.calibrate)
    return f"{calibration['samples']} x {calibration['sequence_length']} tokens of {text}{own}"


def _counted(words: Iterable[str]) -> str:
    """Words with their counts."""
    return ", ".join(f"{n} {word}" for word, n in Counter(words).most_common())


def _shortened(names: Sequence[str], shown: int = 4) -> str | None:
    """The number of names, and the first of them; None if there are none."""
    more = ", …" if len(names) > shown else ""
    return f"{len(names)}: {', '.join(names[:shown])}{more}" if names else None


def not_pruned(left: Sequence[records.SkippedMatrix]) -> str:
    """Matrices that are not pruned, one line per kind."""
    return "\n".join(one.line() for one in left) or "nothing"


def by_layer(silent: Mapping[str, Sequence[int]]) -> str:
    """Numbers of experts by the number of their layer, as one line; empty for none."""
    return "; ".join(f"layer {x}: {', '.join(map(str, own))}" for x, own in silent.items())


def stored_as(layout: Mapping[str, Any]) -> str:
    """How a layout stores a matrix, in a few words: `2:4 int4 g64` has groups of 64."""
    kind = f"{layout.get('pattern', layout['format'])} {layout['values']}"
    return f"{kind} g{layout['group']}" if "group" in layout else kind


# -- prune and structure -------------------------------------------------------------------------


def pruned(manifest: records.Manifest) -> list[Block]:
    """How a model was pruned."""
    return blocks_of(
        "PruneManifest",
        manifest,
        unpruned=not_pruned(manifest.left),
        silent=by_layer((manifest.experts or {}).get("silent", {})),
        text=_text_of(manifest.calibration, manifest.source.name),
    )


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


def compared(title: str, before: records.Counts, after: records.Counts | None) -> Table:
    """A model before and after a cut; `after` is None if it is known only during the run."""
    rows = []
    for name, key in COUNTED.items():
        if then := getattr(before, key):
            form = binary_size if key == "file_bytes" else "{:,}".format
            now = getattr(after, key, None)
            left = ("", "") if now is None else (form(now), f"{now / then:.1%}")
            rows.append((name, form(then), *left))
    return Table.of(title, ("", "before", "after", "left"), rows)


def similarity_of(structure: records.Structure) -> float | None:
    """How alike embeddings are before and after; None if the model predicts tokens."""
    return next((step["similarity"] for step in structure.steps if "similarity" in step), None)


def cut(manifest: records.Manifest) -> list[Block]:
    """What a cut removed in total and in each step, and what it took."""
    structure = manifest.structure
    assert structure is not None

    def left(step: Mapping[str, Any]) -> str:
        share = f"{step['decoder_after'] / max(step['decoder_before'], 1):.1%}"
        return filled("{tokens_after:,} of {tokens_before:,} tokens", step) or share

    about = blocks_of(
        "CutManifest",
        manifest,
        steps=[{**step, "left": left(step)} for step in structure.steps],
        texts=[text for step in structure.steps for text in step.get("texts", ())],
        tokens=next((step for step in structure.steps if "covered" in step), {}),
        text=_text_of(manifest.calibration, manifest.source.name),
        loader="secateur, or trust_remote_code" if structure.varied else "plain transformers",
    )
    return [compared("cut", structure.before, structure.after), *about]


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
    layers: list[records.Layer]
    manifest: records.Manifest | None = None
    output: Path | None = None
    left: list[records.SkippedMatrix] = Field(default_factory=list)
    compression: CompressResult | None = None

    def to_json(self) -> dict[str, Any]:
        """The folder and its manifest; for a loaded model sparsity, layers and what was left."""
        if self.manifest is None:
            return self.model_dump(mode="json", include={"sparsity", "layers", "left"})
        packed = {} if self.compression is None else {"compression": self.compression.to_json()}
        return {"output": str(self.output), **self.manifest.to_json(), **packed}

    def tables(self) -> list[Block]:
        """One table, and the tables of the compression if there was one."""
        if self.manifest is None:
            return blocks_of("PruneResult", self, unpruned=not_pruned(self.left))
        return [*pruned(self.manifest), *(self.compression.tables() if self.compression else ())]

    def following(self) -> list[Block]:
        """Commands for the folder."""
        if self.compression is not None:
            return self.compression.following()
        return [] if self.output is None else _commands(self.output, self.sparsity)


class StructureResult(Result):
    """The result of a structured cut.

    Attributes:
        output: the output folder.
        manifest: choices, steps, cost and result.
    """

    output: Path
    manifest: records.Manifest

    joined = "manifest"

    @property
    def structure(self) -> records.Structure:
        """What the cut removed."""
        assert self.manifest.structure is not None
        return self.manifest.structure

    def tables(self) -> list[Block]:
        """What the cut removed in total and in each step."""
        return cut(self.manifest)

    def following(self) -> list[Block]:
        """Commands for the folder."""
        if similarity_of(self.structure) is not None:  # no other verb takes an embedding model
            return []
        return _commands(self.output, self.manifest.result.decoder_sparsity)


# -- train and chain -----------------------------------------------------------------------------


def trained(training: records.Training) -> list[Block]:
    """What a training read, and what it brought."""
    speed = training.result["tokens"] / (training.cost.training_seconds or 1)
    return blocks_of("Training", training, speed=speed, learns=on_host(training.planned))


def on_host(planned: Mapping[str, Any]) -> str | None:
    """Where the weights of a training are, if that is not the device that computes."""
    return "on the host; the GPU gets a layer at a time" if planned.get("on_host") else None


def _result(name: str, doc: str) -> property:
    """A number of the result of a training."""
    return property(lambda self: self.manifest.result[name], doc=doc)


class TrainResult(Result):
    """The result of a training.

    Attributes:
        output: the output folder.
        manifest: versions, hardware, text, choices, cost and result.
    """

    output: Path
    manifest: records.Training

    joined = "manifest"
    sparsity: ClassVar[Any] = _result(
        "decoder_sparsity", "The fraction of zeros in the decoder's matrices."
    )
    steps: ClassVar[Any] = _result("step", "Optimizer steps.")
    tokens: ClassVar[Any] = _result("tokens", "Tokens that the model read.")
    perplexity_before: ClassVar[Any] = _result(
        "perplexity_before", "Of the validation windows; None without any."
    )
    perplexity_after: ClassVar[Any] = _result(
        "perplexity_after", "The same, of the weights that were kept."
    )

    def tables(self) -> list[Block]:
        """One table."""
        return trained(self.manifest)

    def following(self) -> list[Block]:
        """Commands for the folder."""
        return _commands(self.output, self.sparsity)


class ChainResult(Result, records.Chain):
    """The model after each step of a chain: the record with the folder.

    Attributes:
        links: the model at the start, and after each step.
        output: the output folder.
    """

    @property
    def shares(self) -> list[dict[str, Any]]:
        """Each link with the parts of the first one that are left."""
        first = self.links[0]
        return [
            {"of": x, "kept": x.kept / first.kept, "size": x.file_bytes / first.file_bytes}
            for x in self.links
        ]

    def following(self) -> list[Block]:
        """Commands for the folder."""
        last = self.links[-1]
        return _commands(self.output, None if last.step == "compress" else last.zeros)


# -- compress and decompress ---------------------------------------------------------------------


def packed(record: records.Compression) -> list[Block]:
    """Sizes and formats of a compressed model."""
    stored = {**record.formats}
    if record.embeddings.matrices:
        stored[f"embeddings {record.embedding_values}"] = record.embeddings
    return blocks_of(
        "Compression",
        record,
        stored=[*stored.items()],
        text=_text_of(record.rounding.get("calibration"), record.source),
        learned=record.rounding.get("distillation"),
        lost=record.value_error or None,
    )


class CompressResult(Result, records.Compression):
    """The record of a compression: sizes before and after."""

    source: str = Field("", exclude=True)

    @property
    def parameters(self) -> int:
        """Number of parameters in the source's weight files."""
        return self.bfloat16_bytes // BFLOAT16_BYTES

    def tables(self) -> list[Block]:
        """Sizes and formats."""
        return packed(self)

    def following(self) -> list[Block]:
        """Commands for the folder."""
        return _commands(self.output)


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


# -- import, export and push ---------------------------------------------------------------------


def imported(record: records.Import) -> list[Block]:
    """Where the zeros of an imported model are."""
    every = record.matrices
    dense = [x.name for x in every if x.pattern == "dense"]
    stored = [x for x in every if x.stored_as]
    layers: dict[int, list[records.ImportedMatrix]] = {}
    for matrix in sorted(every, key=lambda x: layer_of(x.name)):
        layers.setdefault(layer_of(matrix.name), []).append(matrix)
    return blocks_of(
        "Import",
        record,
        stored=_counted(str(x.stored_as) for x in stored) or "plain tensors",
        zeros=f"{record.sparsity:.2%}" if record.sparsity else "none: nothing has been pruned",
        patterns=_counted(x.pattern for x in every),
        dense=_shortened(dense) if len(dense) < len(every) else None,
        exact=f"{sum(not x.rounded for x in stored)} of {len(stored)} matrices" if stored else None,
        lost=_shortened(record.dropped),
        layers=[
            {
                "layer": layer,
                "matrices": len(own),
                "zeros": sum(x.zeros for x in own) / sum(prod(x.shape) for x in own),
                "patterns": _counted(x.pattern for x in own),
            }
            for layer, own in layers.items()
        ],
    )


class ImportResult(Result):
    """Where the zeros of an imported model are.

    Attributes:
        output: the folder of the model.
        parameters: of the whole model.
        record: where the model came from, and each matrix.
    """

    output: Path
    parameters: int
    record: records.Import

    joined = "record"

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
        """The folder, the patterns and the record."""
        return {"patterns": self.patterns, **super().to_json()}

    def tables(self) -> list[Block]:
        """What was found, then all layers."""
        return imported(self.record)

    def following(self) -> list[Block]:
        """Commands for the folder."""
        return _commands(self.output, self.sparsity)


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
    exported: InstanceOf[Exported]
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """All numbers."""
        fields = super().to_json()
        return {**fields.pop("exported"), **fields}

    def tables(self) -> list[Block]:
        """One table."""
        made = self.exported
        return blocks_of(
            "ExportResult",
            self,
            paths=[self.output / name for name in self.files],
            types=[f"{n} {name}" for name, n in sorted(made.types.items())],
            zeros=made.zeros / max(made.weights, 1),
        )


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
    files: dict[str, int]
    left_out: tuple[str, ...]
    zeros: float
    card: str
    notes: tuple[str, ...]
    address: str | None

    @property
    def total_bytes(self) -> int:
        """The size of all files."""
        return sum(self.files.values())

    def to_json(self) -> dict[str, Any]:
        """Everything."""
        return {**super().to_json(), "total_bytes": self.total_bytes}

    def tables(self) -> list[Block]:
        """What it is, the files, and for a dry run the card."""
        return blocks_of(
            "PushResult",
            self,
            title="published" if self.address else "would be published",
            kind="private" if self.private else "public",
            on=self.branch or "main",
            sent=self.address or "nothing: this was a dry run",
            entries=[*self.files.items()],
            unsent=None if self.address else self.card,
        )
