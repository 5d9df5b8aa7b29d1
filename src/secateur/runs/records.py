"""The schemas of the files that a run writes with a model, for writers and readers alike.

    manifest.json        Manifest       prune, structure
    layers.jsonl         Layer          prune, a line for each decoder layer
    training.json        [Training]     train, an entry for each training
    chain.json           Chain          chain
    compression.json     Compression    compress
    diagnosis.json       DiagnosisRecord      diagnose
    bench.json           Bench          bench
    evaluation.json      EvaluationRecord     evaluate
    import.json          Import         import
    sweep.json           Sweep          sweep
    steps.json           [StepEntry]      structure, an entry for each step

A file is one object, which its writer makes and its readers get back. Keys that are not declared
are errors for a writer; `read_record` ignores them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar

import pydantic

from secateur.errors import CheckpointError

MANIFEST_VERSION = 1
BFLOAT16_BYTES = 2


class Record(pydantic.BaseModel):
    """A file, or a part of one. A misspelled key is an error when a record is made."""

    model_config = pydantic.ConfigDict(
        frozen=True,
        protected_namespaces=(),
        extra="forbid",
        populate_by_name=True,
        ser_json_inf_nan="constants",
    )

    def to_json(self) -> dict[str, Any]:
        """The content of the file."""
        return self.model_dump(mode="json", by_alias=True)


class PartialRecord(Record):
    """A record of which only the given keys are written, in the order in which they were given."""

    @pydantic.model_validator(mode="wrap")
    @classmethod
    def _keep_order(cls, values: Any, make: Any) -> Any:
        record = make(values)
        if isinstance(values, Mapping):
            fields = record.__dict__
            given = {name: fields[name] for name in values if name in fields}
            object.__setattr__(record, "__dict__", {**given, **fields})
        return record

    @pydantic.model_serializer(mode="wrap")
    def _given_keys(self, write: Any) -> dict[str, Any]:
        given = self.model_fields_set
        return {name: value for name, value in write(self).items() if name in given}


AnyRecord = TypeVar("AnyRecord", bound=Record)


def read_record(record: type[AnyRecord], file: Path) -> AnyRecord:
    """Read a JSON file and check its schema.

    Raises:
        CheckpointError: the file cannot be read, is no JSON, or has another schema; names the file.
    """
    try:
        return parsed(record, file.read_text(encoding="utf-8"), str(file))
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(
            f"the file cannot be read: {error}", where=str(file), remedy="make it again"
        ) from error


def read_list(record: type[AnyRecord], file: Path) -> list[AnyRecord]:
    """Read a JSON file that holds a list of records.

    Raises:
        CheckpointError: it cannot be read, is no list, or an entry has another schema.
    """
    try:
        entries = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(entries, list):
            raise ValueError("the file holds no list")
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"the file cannot be read: {error}", where=str(file), remedy="make it again"
        ) from error
    return [parsed(record, json.dumps(entry), f"{file}:{n}") for n, entry in enumerate(entries, 1)]


def parsed(record: type[AnyRecord], text: str, where: str) -> AnyRecord:
    """Parse a JSON text and check its schema.

    Raises:
        CheckpointError: the text is no JSON, or has another schema.
    """
    try:
        return record.model_validate(json.loads(text), extra="ignore")  # of newer releases
    except pydantic.ValidationError as error:
        faults = [
            f"{'.'.join(str(part) for part in fault['loc']) or 'all of it'}: {fault['msg']}"
            for fault in error.errors()[:3]
        ]
        raise CheckpointError(
            f"not what this release expects there: {'; '.join(faults)}",
            where=where,
            remedy="write it again with this release of secateur",
        ) from None
    except ValueError as error:
        raise CheckpointError(
            f"not JSON: {error}", where=where, remedy="write it again, or remove it"
        ) from None


class Source(Record):
    """The source model of a run."""

    name: str
    kind: str
    revision: str | None
    file_bytes: int


class Cost(PartialRecord):
    """The cost of a run."""

    seconds: float
    peak_resident_bytes: int
    peak_is_of_this_run_alone: bool
    peak_cuda_bytes: int | None = None
    resumed: bool = False
    processes: int = 1
    training_seconds: float | None = None


class RunResult(Record):
    """The result of a run."""

    decoder_sparsity: float
    model_sparsity: float
    parameters: int
    file_bytes: int


class Counts(Record):
    """The parts of a model, counted. Tied weights count once.

    Attributes:
        attention: parameters of attention sub-blocks, without norms.
        ffn: parameters of dense feed-forwards.
        experts: parameters of mixtures of experts, with routers.
        norms: parameters of norms.
        embeddings: parameters of embeddings, head and their projections.
        other: all other parameters.
        decoder: all parameters of the decoder layers.
        kv_cache_bytes_per_token: what one token adds to the caches of all layers, in the model's
            dtype; layers with a sliding window stop growing at the window.
        file_bytes: bytes of all tensors, without file headers.
        parameters: all parameters.
    """

    attention: int
    ffn: int
    experts: int
    norms: int
    embeddings: int
    other: int
    decoder: int
    kv_cache_bytes_per_token: int
    file_bytes: int
    parameters: int


class Structure(Record):
    """What a structured cut removed."""

    steps: tuple[dict[str, Any], ...]
    before: Counts
    after: Counts
    decoder_removed: float
    removed: float
    varied: bool
    latency: dict[str, Any] | None


class SkippedMatrix(Record):
    """Tensors of one sort that are not pruned.

    Attributes:
        names: one pattern for all of them, `*` for numbers; or the name of their part of the model.
        reason: why.
        tensors: how many.
        weights: values in them.
    """

    names: str
    reason: str
    tensors: int
    weights: int

    def line(self) -> str:
        """One line for people."""
        return f"{self.names}: {self.reason}, {self.weights:,} weights"


class MustKeep(Record):
    """A bound of `--must-keep` beside what was measured.

    Attributes:
        bound: as the user wrote it.
        value: a share, or nats per token.
        standard_error: of the value, over items, texts or windows; None for a single one.
        measure: what the value is, with the scores that it comes from.
        protocol_id: of the results in `evaluation.json`; of several tasks, the first one's.
        holds: whether the value is within the limit.
    """

    bound: str
    value: float
    standard_error: float | None
    measure: str
    protocol_id: str
    holds: bool


class Manifest(PartialRecord):
    """`manifest.json`."""

    manifest_version: int
    source: Source
    formats: dict[str, str] | None = None
    family: str = ""
    method: dict[str, Any]
    allocation: dict[str, Any]
    calibration: dict[str, Any] | None = None
    calibration_digest: str | None = None
    environment: dict[str, Any]
    plan: dict[str, Any] = pydantic.Field(default_factory=dict)
    cost: Cost
    result: RunResult
    structure: Structure | None = None
    distillation: dict[str, Any] | None = None
    experts: dict[str, Any] | None = None
    reach: dict[str, Any] = pydantic.Field(default_factory=dict)
    collapsed: tuple[str, ...] = ()
    left: tuple[SkippedMatrix, ...] = ()
    must_keep: tuple[MustKeep, ...] = ()

    @property
    def lost(self) -> float:
        """The lost fraction of the decoder: cut out or zero."""
        gone = self.structure.decoder_removed if self.structure else 0.0
        return 1 - (1 - gone) * (1 - self.result.decoder_sparsity)


class LinearRecord(Record):
    """One pruned matrix, in a line of `layers.jsonl`.

    Attributes:
        name: its full name.
        shape: (out, in).
        asked: the sparsity of its task.
        pruned: number of weights that the mask removes.
        zeros: number of zero weights afterwards (the source may already have zeros).
        error: relative squared error of its output on the calibration inputs, if known.
        lost: an estimate of that error if the solver measures none (`lost_energy`).
        seconds: time for scoring, masking and solving.
        tokens: number of calibration tokens that it received; None if its inputs did not matter.
    """

    name: str
    shape: tuple[int, int]
    asked: float
    pruned: int
    zeros: int
    error: float | None
    lost: float | None
    seconds: float
    tokens: int | None = None


class Layer(PartialRecord):
    """A line of `layers.jsonl`.

    Attributes:
        layer: its number.
        seconds: its wall time.
        linears: its pruned matrices.
        reconstruction: the errors before and after tuning.
        collapsed: linears that lost their outputs.
        unseen: linears of experts that calibration did not reach, and that stay dense.
    """

    layer: int
    seconds: float
    linears: tuple[LinearRecord, ...]
    reconstruction: dict[str, float] = pydantic.Field(default_factory=dict)
    collapsed: dict[str, float] = pydantic.Field(default_factory=dict)
    unseen: tuple[str, ...] = ()


class Training(Record):
    """An entry of `training.json`."""

    source: Source
    objective: str
    text: dict[str, Any]
    learning_rate: float
    optimizer: str
    processes: int
    recipe: dict[str, Any]
    environment: dict[str, Any]
    planned: dict[str, Any]
    cost: Cost
    result: dict[str, Any]


class ChainStep(Record):
    """What is left after a step of a chain.

    Attributes:
        step: the verb; `source` for the model as it was.
        parameters: of the whole model.
        zeros: of its parameters.
        file_bytes: of the weight files.
        seconds: that the step took.
        kept: parameters that are there and not zero.
    """

    step: str
    parameters: int
    zeros: int
    file_bytes: int
    seconds: float
    kept: int


class Chain(Record):
    """`chain.json`."""

    links: tuple[ChainStep, ...]
    output: Path


class FormatTotals(Record):
    """Totals over matrices that are stored in the same way.

    Attributes:
        matrices: number of matrices.
        weights: number of weights, including zeros.
        nonzeros: number of weights that are not zero.
        bytes: their size in the files, scales included.
        bits_per_weight: counting zeros as weights, and scales as a part of them.
        ratio: the size as a fraction of the same matrices in dense bfloat16.
    """

    matrices: int = 0
    weights: int = 0
    nonzeros: int = 0
    bytes: int = 0
    bits_per_weight: float = 0.0
    ratio: float = 0.0

    def plus(self, weights: int, nonzeros: int, size_bytes: int, matrices: int = 1) -> FormatTotals:
        """The totals with another matrix."""
        weights, size = self.weights + weights, self.bytes + size_bytes
        bits = 8 * size / weights if weights else 0.0
        return FormatTotals(
            matrices=self.matrices + matrices,
            weights=weights,
            nonzeros=self.nonzeros + nonzeros,
            bytes=size,
            bits_per_weight=bits,
            ratio=bits / (8 * BFLOAT16_BYTES),
        )


class Compression(PartialRecord):
    """`compression.json`.

    Attributes:
        output: the output folder.
        archive: whether the files are also compressed with zstandard.
        source_bytes: size of the source's weight files.
        bfloat16_bytes: the size of the model in dense bfloat16.
        file_bytes: size of the written weight files.
        ratio: the size of the files as a fraction of the model in dense bfloat16.
        sparsity: fraction of zeros in the prunable matrices.
        negative_zeros: number of zeros that changed from −0.0 to +0.0.
        linears: totals over the prunable matrices.
        formats: totals by format and values, for example `bitmask int8`.
        embeddings: totals over embedding and head.
        embedding_values: how these are stored, for example `bfloat16` or `int4 g64`.
        rounding: record of the calibrated rounding to integers, if it was used.
        value_error: ‖W − Ŵ‖ / ‖W‖ of the linears, with Ŵ the stored values; 0 if nothing was lost.
        dense_file_bytes: size of the weight files if they stored the zeros: `as here` with the same
            values, and with `int8` and `int4` linears; empty for an archive.
        seconds: wall time.
        source: the model that was compressed.
    """

    output: Path
    archive: bool
    source_bytes: int
    bfloat16_bytes: int
    file_bytes: int
    ratio: float
    sparsity: float
    negative_zeros: int
    linears: FormatTotals
    formats: dict[str, FormatTotals]
    embeddings: FormatTotals
    rounding: dict[str, Any]
    value_error: float
    dense_file_bytes: dict[str, int]
    seconds: float
    source: str = ""
    embedding_values: str = ""


class StepEntry(PartialRecord):
    """An entry of `steps.json`.

    Attributes:
        step: vocabulary, depth, experts, routers, hidden, refit, queries or width.
        by: how the units were selected; None where `score` and `solver` say it.
        text: of a vocabulary step: where tokens were counted.
        tokens_before: of a vocabulary step: rows of the embedding.
        tokens_after: of a vocabulary step: tokens that stay.
        documents: of a vocabulary step: documents of the text.
        same_documents: of a vocabulary step: those whose tokens all stay.
        covered: of a vocabulary step: share of the text's tokens that stay.
        similarity: of a vocabulary step of an embedding model: the lowest cosine similarity of last
            hidden states, and of their means, before and after, on the first documents.
        texts: of a vocabulary step: name and weight of each text, its documents, how many tokens
            it takes before and after, and the share of its tokens that stay.
        among_kept: of a vocabulary step: the loss on a few windows, of the uncut model, of the same
            among the tokens that stay, and of the smaller model; and by how much the logits of
            these two differ at most, as a fraction of the largest.
        scope: of a step of experts: where they compete.
        use: of a step of experts: by layer the tokens of each expert, and its score by REAP.
        errors: of a routers step: by layer the error on held-out windows, at first and after each
            part of the tuning.
        score: of a width step.
        solver: of a width step.
        allocation: of a width step.
        by_weights: of a width step: by layer the experts that no token reached, whose neurons were
            chosen by their weights.
        units: of a depth step: layers.
        fitness: of a depth step: the loss of the selected layers.
        scores: of a depth step, one for each unit.
        cut: the units that stay, as `structured.cut.Cut` writes them; None for a refit.
        before: parameters by kind.
        after: parameters by kind.
        varied: whether the layers have different sizes.
    """

    step: str
    scope: str | None = None
    use: dict[str, Any] | None = None
    errors: dict[str, dict[str, float]] | None = None
    by: str | None = None
    text: str | None = None
    tokens_before: int | None = None
    tokens_after: int | None = None
    documents: int | None = None
    same_documents: int | None = None
    covered: float | None = None
    similarity: float | None = None
    texts: list[dict[str, Any]] | None = None
    among_kept: dict[str, float] | None = None
    score: str | None = None
    solver: str | None = None
    allocation: Any = None
    by_weights: dict[str, list[int]] | None = None
    units: str | None = None
    fitness: Any = None
    scores: Any = None
    cut: dict[str, Any] | None = None
    before: dict[str, int]
    after: dict[str, int]
    varied: bool


class ImportedMatrix(Record):
    """One matrix of the decoder layers.

    Attributes:
        name: its name.
        shape: outputs and inputs.
        zeros: how many weights are zero.
        pattern: N:M, unstructured or dense, found in the written file.
        stored_as: how the source stored it; None as a plain tensor.
        rounded: whether the dtype of the model cannot hold the exact values of the source.
    """

    name: str
    shape: tuple[int, int]
    zeros: int
    pattern: str
    stored_as: str | None
    rounded: bool


class Import(Record):
    """`import.json`.

    Attributes:
        source: the folder that was imported.
        kind: which kind of source it was.
        masks: name and SHA-256 of the file of masks; None without one.
        adapter: name, kind and SHA-256 of the adapter; None without one.
        told: what the configuration of the source said of its compression.
        dropped: stored tensors that are no part of the model.
        notes: what a user must know, one sentence each.
        environment: versions and hardware.
        seconds: wall time.
        sparsity: of the matrices of the decoder.
        matrices: every matrix of the decoder layers.
    """

    schema_name: Literal["secateur.import/1"] = pydantic.Field(alias="schema")
    source: Source
    kind: str
    masks: dict[str, str] | None
    adapter: dict[str, str] | None
    told: dict[str, Any]
    dropped: tuple[str, ...]
    notes: tuple[str, ...]
    environment: dict[str, Any]
    sparsity: float
    matrices: tuple[ImportedMatrix, ...]
    seconds: float
