"""The records of measurements of finished models: evaluations, sweeps, diagnoses and benches.

`evaluation.json` holds the results of several calls, every number with its protocol: a new result
replaces an earlier one with the same protocol id, and all others stay. `docs/evaluation.md`
documents it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar

from pydantic import Field, model_validator

from secateur.runs.output import write_json, write_record, writing
from secateur.runs.records import PartialRecord, Record, read_record

Severity = Literal["error", "warning", "note"]
"""An error means that the model is not what it claims to be, or does not work."""


@dataclass(frozen=True)
class Finding:
    """One finding of a diagnosis.

    Attributes:
        id: the kind; docs/diagnosis.md has an entry for each.
        severity: how severe.
        where: the tensor, layer or file.
        evidence: the measured numbers.
        remedy: what to do about it.
    """

    id: str
    severity: Severity
    where: str
    evidence: str
    remedy: str


Measured = TypeVar("Measured", float, float | None)
"""A number, or one that may be missing."""


class Drift(Record, Generic[Measured]):
    """A pruned decoder layer compared with the dense one; medians over tokens.

    Attributes:
        relative_error: of the hidden states after the layer, ‖ŷ − y‖ / ‖y‖.
        cosine: of these hidden states.
        norm_ratio: of these hidden states, ‖ŷ‖ / ‖y‖.
        own_error: of the layer alone, relative to the dense layer's addition.
        contribution: the layer's own addition, relative to the dense layer's.
    """

    relative_error: Measured
    cosine: Measured
    norm_ratio: Measured
    own_error: Measured
    contribution: Measured


class _LayerSparsity(Record):
    """The zeros in the matrices of a layer."""

    layer: int
    sparsity: float


class LayerState(Drift[float | None], _LayerSparsity):
    """The zeros of a layer and what they did to it, as far as it was measured."""

    could_bear: float | None


class MatrixState(Record):
    """The counts of a diagnosis for one matrix."""

    name: str
    sparsity: float
    claimed: float | None
    dead_rows: int
    dead_columns: int


class _OfModel(Record):
    """What was measured on a model, beside its dense one.

    Attributes:
        schema_name: what the file holds.
        model: the model.
        dense: what it is compared with.
        environment: versions and hardware.
    """

    schema_name: str = Field(alias="schema")
    model: str
    dense: Any
    environment: dict[str, Any]


class DiagnosisRecord(_OfModel):
    """`diagnosis.json`."""

    schema_name: Literal["secateur.diagnosis/1"] = Field(alias="schema")
    dense: str | None
    protocol: dict[str, Any]
    verdict: str
    findings: list[Finding]
    layers: tuple[LayerState, ...]
    linears: tuple[MatrixState, ...]


class TimingEntry(PartialRecord):
    """The timing of one way to run a model, or the reason why it could not run."""

    contender: str
    failure: str | None = None
    tokens_per_second: float | None = None
    tokens_per_second_least: float | None = None
    tokens_per_second_most: float | None = None
    prompt_tokens_per_second: float | None = None
    first_token_seconds: float | None = None
    resident_bytes: int | None = None
    rounds: int | None = None


class Bench(Record):
    """`bench.json`."""

    schema_name: Literal["secateur.bench/1"] = Field(alias="schema")
    model: str
    contenders: tuple[TimingEntry, ...]
    file_bytes: int
    dense_bytes: int
    verdict: str
    protocol: dict[str, Any]


FILE_NAME = "evaluation.json"
"""The name of the file in the folder `secateur/` of a run."""

SCHEMA: Literal["secateur.evaluation/2"] = "secateur.evaluation/2"


class Measurement(Record):
    """The fields that every result has besides its numbers.

    Attributes:
        protocol: everything the numbers depend on besides the model.
        protocol_id: its short name.
        reference: the dense model of the comparison; None without one.
        environment: versions and hardware.
        inherited_from: the model that was measured, if it is another one with the same weights.
    """

    protocol: dict[str, Any]
    protocol_id: str
    reference: str | None
    environment: dict[str, Any]
    inherited_from: str | None = None

    @property
    def key(self) -> tuple[str, ...]:
        """A key that two results share if the newer replaces the older."""
        return (self.protocol_id,)

    def after(self, earlier: Measurement) -> Measurement:
        """The result that replaces an earlier one with the same key: this one.

        Without a reference it keeps the earlier numbers of the reference that are still valid.
        """
        if self.reference is not None or earlier.reference is None:
            return self
        kept = self.reference_numbers(earlier)
        return self.model_copy(update={**kept, "reference": earlier.reference}) if kept else self

    def reference_numbers(self, earlier: Any) -> Mapping[str, Any]:
        """The earlier fields of the reference that are still valid with this result, if any."""
        return {}


class _TextMeasurement(Measurement):
    """A measurement on one text."""

    text: str


class PerplexityRecord(_TextMeasurement):
    """Perplexity on one text; `reference_perplexity` is the dense model's on the same windows."""

    perplexity: float
    mean_loss: float
    standard_error: float | None
    reference_perplexity: float | None
    seconds: float

    def reference_numbers(self, earlier: PerplexityRecord) -> Mapping[str, Any]:
        """The perplexity of the reference depends only on the protocol."""
        return {"reference_perplexity": earlier.reference_perplexity}


class Divergence(Record):
    """Means over all predicted tokens. Standard errors are over windows; None for one window.

    Attributes:
        kl: KL(dense ‖ pruned), nats per token.
        kl_standard_error: standard error of `kl`.
        top1_agreement: share of positions where both models rank the same token first.
        top1_standard_error: standard error of `top1_agreement`.
        acceptance: Σ_v min(p(v), q(v)), the share of tokens of the pruned model that speculative
            decoding accepts; None in files of earlier releases.
        acceptance_standard_error: standard error of `acceptance`.
        loss_change: loss of the pruned model minus loss of the dense one, nats per token.
        loss_change_standard_error: standard error of the paired differences.
        tokens: number of predicted tokens.
    """

    kl: float
    kl_standard_error: float | None
    top1_agreement: float = Field(ge=0, le=1)
    top1_standard_error: float | None
    acceptance: float | None = Field(None, ge=0, le=1)
    acceptance_standard_error: float | None = None
    loss_change: float
    loss_change_standard_error: float | None
    tokens: int


class DivergenceRecord(Divergence, _TextMeasurement):
    """Distance from the reference on a text."""


class Acceptance(Record):
    """How much of a draft's text its parent takes. Standard errors are over windows; None for one.

    Attributes:
        mean: the mean of a_t = Σ_x min(p_t(x), q_t(x)): the probability that rejection sampling
            takes a token that the draft has drawn, at temperature 1.
        standard_error: standard error of `mean`.
        agreement: the share of positions where both models rank the same token first: that a token
            of the draft is taken in greedy decoding.
        agreement_standard_error: standard error of `agreement`.
        runs: the mean of Π_{j<i} a_{t+j}, for i = 1, 2, …: that the first i tokens are all taken.
        greedy_runs: the same in greedy decoding.
        tokens: number of positions.
    """

    mean: float = Field(ge=0, le=1)
    standard_error: float | None
    agreement: float = Field(ge=0, le=1)
    agreement_standard_error: float | None
    runs: tuple[float, ...]
    greedy_runs: tuple[float, ...]
    tokens: int


@dataclass(frozen=True)
class Drawing:
    """Seconds of drawing tokens from logits, at some temperature.

    Attributes:
        proposed: of one token of a draft.
        judged: of one token of the parent: a proposed one is taken, or another one drawn.
    """

    proposed: float
    judged: float


@dataclass(frozen=True)
class Speculation:
    """What a draft gains with some number of proposed tokens.

    Attributes:
        k: tokens that are proposed in each round; 0 where no number pays.
        accepted: of these, the expected number that is taken.
        speedup: over decoding without the draft.
    """

    k: int
    accepted: float
    speedup: float


class Score(Record):
    """One metric of one task.

    Attributes:
        task: name of the task.
        metric: acc; acc_norm: log-likelihoods divided by the length of the answers; or exact_match
            of written answers, with the name of the task's filter that reads them.
        value: the mean over items.
        standard_error: standard error over items; None for one item.
        chance: the mean score of guessing; 0 if there are no choices.
        items: number of items.
        shots: number of solved examples before each question.
    """

    task: str
    metric: str
    value: float = Field(ge=0, le=1)
    standard_error: float | None
    chance: float = Field(ge=0, le=1)
    items: int = Field(ge=1)
    shots: int = Field(ge=0)


class Comparison(Record):
    """A model's score compared with a reference's, over the same items; null without a reference.

    Attributes:
        reference_value: the reference's score.
        difference: the model's score minus the reference's.
        difference_standard_error: standard error of the difference, over pairs; None for one item.
        significant: whether the difference is significant at 95 %; None for one item.
        retention: share of the reference's lead over chance that the model keeps; None if the
            reference has no lead.
    """

    reference_value: float | None
    difference: float | None
    difference_standard_error: float | None
    significant: bool | None
    retention: float | None


class TaskRecord(Comparison, Score, Measurement):
    """One metric of one task."""

    @property
    def key(self) -> tuple[str, ...]:
        """Both metrics of a task have its protocol id."""
        return self.protocol_id, self.metric

    def reference_numbers(self, earlier: TaskRecord) -> Mapping[str, Any]:
        """The comparison in pairs is valid if the score is unchanged."""
        if self.value != earlier.value:
            return {}
        return {name: getattr(earlier, name) for name in Comparison.model_fields}


class SampleRecord(Record):
    """A prompt, and the continuations by the model and the reference.

    Attributes:
        prompt: the prompt.
        text: that the model generated.
        reference_text: that the reference generated, if there is one.
        repetition: share of the 4-grams of the text that are repeats.
        reference_repetition: of the reference's text.
        degenerate: whether more than half are repeats, or the text is empty.
    """

    prompt: str
    text: str
    reference_text: str | None = None
    repetition: float = Field(ge=0, le=1)
    reference_repetition: float | None = None
    degenerate: bool


class GenerationRecord(Measurement):
    """Texts; `repetition` is the mean of the samples, `degenerate` their count."""

    samples: list[SampleRecord]
    repetition: float
    degenerate: int
    reference_repetition: float | None
    reference_degenerate: int | None

    def reference_numbers(self, earlier: GenerationRecord) -> Mapping[str, Any]:
        """The texts of the reference are valid if the model's texts are unchanged."""
        if [one.text for one in self.samples] != [one.text for one in earlier.samples]:
            return {}
        return {
            "samples": earlier.samples,
            "reference_repetition": earlier.reference_repetition,
            "reference_degenerate": earlier.reference_degenerate,
        }


class EvaluationRecord(Record):
    """The whole file, or the results of one call."""

    schema_name: Literal["secateur.evaluation/2"] = Field(default=SCHEMA, alias="schema")
    model: str
    perplexity: list[PerplexityRecord]
    divergence: list[DivergenceRecord]
    tasks: list[TaskRecord]
    generation: list[GenerationRecord]

    @property
    def results(self) -> list[Measurement]:
        """All results of all kinds."""
        return [one for kind in KINDS for one in getattr(self, kind)]

    def after(self, earlier: EvaluationRecord) -> EvaluationRecord:
        """These results, and earlier ones that were not measured again."""

        def merged(kind: str) -> list[Any]:
            found: dict[tuple[str, ...], Any] = {one.key: one for one in getattr(earlier, kind)}
            for one in getattr(self, kind):
                found[one.key] = one.after(found[one.key]) if one.key in found else one
            return [*found.values()]

        return self.model_copy(update={kind: merged(kind) for kind in KINDS})

    def inherited(self) -> EvaluationRecord:
        """The same results for another model with the same weights, each marked as inherited."""

        def marked(one: Measurement) -> Measurement:
            return one.model_copy(update={"inherited_from": one.inherited_from or self.model})

        return self.model_copy(update={x: [*map(marked, getattr(self, x))] for x in KINDS})

    def save(self, file: Path) -> None:
        """Write the file in one step: an interrupted write keeps the old file.

        Raises:
            SecateurError: the file cannot be written.
        """
        with writing(file):
            write_json(file, self.to_json())

    def add_to(self, file: Path) -> None:
        """Add these results to a model's file, which need not exist yet; see `write_record`.

        Raises:
            CheckpointError: the existing file cannot be read.
        """
        whole = self.after(read_evaluation(file)) if file.is_file() else self
        write_record(file, whole.to_json())


KINDS = ("perplexity", "divergence", "tasks", "generation")
"""The kinds of results in `EvaluationRecord`."""


def read_evaluation(file: Path) -> EvaluationRecord:
    """Read and check the file; raises as `read_record`."""
    return read_record(EvaluationRecord, file)


PointKey = tuple[str, str, float]
"""Method, pattern and sparsity of a point of a sweep."""


class SweepPoint(Record):
    """One pruned model of a sweep, evaluated.

    Attributes:
        method: a famous name, or a preset.
        pattern: which zeros are allowed.
        sparsity: the fraction of zeros that was requested.
        perplexity: by text.
        excess: ln(perplexity) − ln(dense perplexity), nats per token, by text.
        zeros: the fraction of zeros found in the decoder's matrices.
        seconds: of pruning.
        peak_resident_bytes: of pruning.
        notes: the folder that holds the notes of the run (`secateur/`), within that of the sweep.
    """

    method: str
    pattern: str
    sparsity: float
    perplexity: dict[str, float]
    excess: dict[str, float]
    zeros: float
    seconds: float
    peak_resident_bytes: int
    notes: str

    @property
    def key(self) -> PointKey:
        """What distinguishes points."""
        return self.method, self.pattern, round(self.sparsity, 6)


class SweepDense(Record):
    """The dense model of a sweep: its perplexity by text; empty until it is evaluated."""

    perplexity: dict[str, float] = Field(default_factory=dict)


class Sweep(_OfModel):
    """`sweep.json`.

    Attributes:
        model: the model that was pruned.
        dense: what all points are compared with.
        environment: versions and hardware.
        conditions: what all points have in common; a resumed sweep has the same.
        protocol: of the perplexity, by text.
        calibration: where the windows are from; None if no method needs any.
        points: in the order of the plan.
        failures: points that could not be made, and why.
    """

    schema_name: Literal["secateur.sweep/1"] = Field("secateur.sweep/1", alias="schema")
    dense: SweepDense
    conditions: dict[str, Any]
    protocol: dict[str, dict[str, Any]]
    calibration: dict[str, Any] | None
    points: tuple[SweepPoint, ...]
    failures: tuple[dict[str, Any], ...]

    @model_validator(mode="after")
    def same_texts(self) -> Sweep:
        """Every point has the texts of the dense model."""
        texts = self.dense.perplexity.keys()
        for point in self.points:
            if not point.perplexity.keys() == point.excess.keys() == texts:
                raise ValueError(f"{point.method} {point.pattern} was evaluated on other texts")
        return self
