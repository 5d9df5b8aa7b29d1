"""What the measurements of a run say: the headline, the table of quality, sections of a card.

A claim has a number only if it was measured. Otherwise it names the command that measures it. The
card of a run has the same numbers in Markdown, and that of a published model also those that the
hub reads.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import yaml

from secateur.evaluation.perplexity import COMPUTED, judged_part
from secateur.report_page.records import ReportedRun
from secateur.reporting.cards import OURS, split_card, without_folders
from secateur.reporting.draft import DraftResult
from secateur.reporting.evaluate import GAIN, fastest_other
from secateur.reporting.fit import ONLY_ROUNDED, WINNER, FitResult
from secateur.reporting.next_steps import command
from secateur.reporting.tables import (
    bare_name,
    binary_size,
    counted,
    duration,
    markdown_table,
    percent,
    plus_minus,
    signed,
    with_error,
)
from secateur.runs.records import Compression
from secateur.runs.records.measured import (
    DivergenceRecord,
    EvaluationRecord,
    Measurement,
    PerplexityRecord,
    TaskRecord,
)

Tone = Literal["", "good", "fair", "bad"]

FAIR_RATIO = 1.25
"""A perplexity up to this factor of the dense one is fair; a higher one is bad."""
FAIR_RETENTION = 0.8
"""Keeping at least this share of the dense model's lead over chance is fair; less is bad."""


@dataclass(frozen=True)
class Claim:
    """One claim of the headline.

    Attributes:
        title: its title.
        value: the number, shown large, or words if there is none.
        description: the meaning of the number, in a sentence.
        measured: whether there is a number.
        command: the command that measures it, if there is no number.
        tone: the colour of the number: good, fair or bad; empty for no judgement.
    """

    title: str
    value: str
    description: str
    measured: bool = True
    command: str = ""
    tone: Tone = ""


def claims(run: ReportedRun) -> list[Claim]:
    """The three claims about a run."""
    return [_smaller(run), _faster(run), _quality(run)]


def _smaller(run: ReportedRun) -> Claim:
    """The size of the files, compared with the same model in dense bfloat16."""
    found, cut = run.compression, run.manifest.structure
    if found is None and cut is not None:
        before, after = cut.before.file_bytes, cut.after.file_bytes
        saved = 1 - after / before
        said = (
            f"{binary_size(after)} instead of {binary_size(before)} in the same dtype; "
            f"{percent(cut.decoder_removed, 2)} of the decoder was cut out."
        )
        return Claim("Smaller by", percent(saved), said, tone="good" if saved > 0 else "bad")
    if found is None:
        return _not_packed(run)
    saved = 1 - found.ratio
    dense = f"{binary_size(found.bfloat16_bytes)} in dense bfloat16"
    against = f"{binary_size(found.file_bytes)} instead of {dense}{_parts_of_saving(found)}."
    return Claim("Smaller by", percent(saved), against, tone="good" if saved > 0 else "bad")


def _parts_of_saving(found: Compression) -> str:
    """How much of the saving is rounding, and how much the zeros that are not stored."""
    zeros = f"{percent(found.sparsity, 2)} zeros"
    whole, dense = found.bfloat16_bytes, found.dense_file_bytes["as here"]
    by_zeros = (dense - found.file_bytes) / whole
    if dense >= whole:
        return f"; all of it by leaving out {zeros}"
    words = (word for name in found.formats for word in name.split())  # `bitmask int4 g64`
    types = dict.fromkeys(word for word in words if word.startswith(("int", "float", "bf")))
    values = " and ".join(types)
    return (
        f": {percent((whole - dense) / whole)} by {values} alone ({binary_size(dense)}), "
        f"{percent(by_zeros)} more by leaving out {zeros}"
    )


def _not_packed(run: ReportedRun) -> Claim:
    """A sentence: the zeros are still stored, and how large other files of these weights are."""
    result, source = run.manifest.result, run.manifest.source
    sizes = [
        f"{binary_size(result.file_bytes)} in this folder",
        f"{binary_size(2 * result.parameters)} as dense bfloat16",
        f"{binary_size(source.file_bytes)} in {run.dense}",
    ]
    return Claim(
        "Smaller by",
        "not packed",
        f"{percent(result.decoder_sparsity, 2)} of the decoder's weights are zero, and stored as "
        f"zeros: {', '.join(sizes)}. To pack them:",
        measured=False,
        command=command("compress", run.place, "--output", f"{run.place}-small"),
    )


def _faster(run: ReportedRun) -> Claim:
    """Tokens per second, compared with the fastest dense way to run the same model here."""
    timed = run.bench.contenders if run.bench else ()
    rates = {c.contender: c.tokens_per_second for c in timed if c.tokens_per_second}
    found = fastest_other(rates)
    if found is None:
        failed = "" if run.bench is None else "The measurement had nothing to compare. "
        said = f"{failed}Timing it on your machine:"
        return Claim("Faster by", "not measured", said, measured=False, command=run.timing())
    (other, theirs), ours = found, rates["packed"]
    ratio = ours / theirs
    description = (
        f"{ours:.0f} tokens a second, {theirs:.0f} by {other}, the fastest dense way tried."
    )
    if ratio < GAIN:
        return Claim("Faster by", "no gain", description, tone="fair")
    return Claim("Faster by", f"{ratio:.2f}×", description, tone="good")


def _quality(run: ReportedRun) -> Claim:
    """How much of the dense model's quality is kept: by tasks, otherwise by perplexity."""
    found = run.evaluation
    if found is not None:
        kept = [task for task in found.tasks if task.retention is not None]
        if kept:
            return _inherited(kept, _kept_on_tasks(kept, len(found.tasks)))
        if found.perplexity:
            first = found.perplexity[0]
            return _inherited([first], _kept_by_perplexity(run, first, found))
    said = "Judging it beside the dense model:"
    return Claim("Quality kept", "not measured", said, measured=False, command=run.judging())


def _inherited(results: Sequence[Measurement], claim: Claim) -> Claim:
    """Add to a claim that it was measured on another model with the same weights, if so."""
    names = dict.fromkeys(one.inherited_from for one in results if one.inherited_from)
    if not names:
        return claim
    of = " and ".join(map(bare_name, names))
    description = (
        f"{claim.description} Measured on {of}, which has the same weights, not on this folder."
    )
    return replace(claim, description=description)


def _kept_on_tasks(kept: Sequence[TaskRecord], of: int) -> Claim:
    """The mean retention over tasks on which the dense model is clearly better than chance."""
    mean = sum(task.retention or 0 for task in kept) / len(kept)
    worse = sum(bool(t.significant) and (t.difference or 0) < 0 for t in kept)
    left_out = f" ({of - len(kept)} left out: dense is near chance)" if of > len(kept) else ""
    tasks = f"mean of {counted(len(kept), 'task')}{left_out}"
    return Claim(
        "Quality kept",
        percent(mean),
        f"of the dense model's accuracy above chance, {tasks}; "
        + (f"significantly worse on {worse}." if worse else "on none significantly worse."),
        tone="good" if worse == 0 else "fair" if mean >= FAIR_RETENTION else "bad",
    )


def _kept_by_perplexity(
    run: ReportedRun, found: PerplexityRecord, evaluation: EvaluationRecord
) -> Claim:
    """The perplexity, with the dense model's if it was measured."""
    if not found.reference_perplexity:
        return Claim(
            "Quality",
            f"{found.perplexity:.1f}",
            f"perplexity on {bare_name(found.text)}. The dense model was not judged beside it:",
            command=run.judging(),
        )
    ratio = found.perplexity / found.reference_perplexity
    agreement, pairs = "", found.protocol.items()
    for moved in (one for one in evaluation.divergence if one.protocol.items() >= pairs):
        same = percent(moved.top1_agreement)
        agreement = f" The most likely token is the same {same} of the time."
    excess = math.log(ratio) if ratio > 0 and math.isfinite(ratio) else math.inf
    dense = f"dense {found.reference_perplexity:.2f} ({signed(excess, 3)} nats per token)"
    return Claim(
        "Quality: perplexity",
        f"×{ratio:.2f}",
        f"{found.perplexity:.2f} on {bare_name(found.text)}, {dense}.{agreement}",
        tone="good" if ratio < GAIN else "fair" if ratio < FAIR_RATIO else "bad",
    )


BOUNDS = {
    "max_size": "at most {}",
    "max_inference_memory": "at most {} of memory",
    "max_loss_increase": "loss at most {} higher",
    "decode_speedup": "at least {} times as fast as dense int8",
    "min_accuracy_kept": "at least {} of the accuracy",
}
"""Bounds in words."""

LEAST_GAIN = 0.005
"""A difference in nats per token that is no more than this counts as none."""


def fit_summary(result: FitResult) -> str:
    """The bounds, how many candidates were made, and how long it took."""
    bounds = [BOUNDS[one.option].format(one.format_value(one.wanted)) for one in result.checks]
    healed = sum(one.healed is not None for one in result.finalists)
    return (
        f"fit: {', '.join(bounds) or 'no bound'}; {len(result.finalists)} candidates were made, "
        f"{healed} healed; {duration(result.seconds)}"
    )


def fit_claims(result: FitResult) -> list[Claim]:
    """Size, loss, and what pruning brought."""
    packed, loss = result.packed, result.losses[WINNER].loss_increase
    return [
        Claim(
            "Smaller by",
            percent(1 - packed.ratio),
            f"{binary_size(packed.file_bytes)} instead of {binary_size(packed.bfloat16_bytes)} in "
            "dense bfloat16.",
            tone="good" if packed.ratio < 1 else "bad",
        ),
        Claim(
            "Loss",
            signed(loss, 3),
            "nats per token above the dense model, on text that was used for nothing else.",
            tone="good" if loss < 0.05 else "fair" if loss < 0.3 else "bad",
        ),
        pruning_brought(result),
    ]


def draft_claims(result: DraftResult) -> list[Claim]:
    """What a draft is expected to bring, what the parent accepts, and what it costs."""
    best, unhealed = max(result.sampled.speedup, result.greedy.speedup), result.unhealed
    before = "" if unhealed is None else f", {percent(unhealed.mean)} before healing"
    return [
        Claim(
            "Faster by, output unchanged",
            f"{best:.2f}×",
            f"expected from measured times: {result.greedy.speedup:.2f}× in greedy decoding, "
            f"{result.sampled.speedup:.2f}× at temperature 1. On text of your own: "
            f"`secateur bench {bare_name(result.parent)} --draft {result.output.name}`.",
            tone="fair" if result.broken else "good",
        ),
        Claim(
            "Accepted",
            percent(result.acceptance.mean),
            f"of its tokens at temperature 1{before}; "
            f"{percent(result.acceptance.agreement)} in greedy decoding.",
        ),
        Claim(
            "Cost of a token",
            percent(result.cost),
            f"of a token of {bare_name(result.parent)}; {binary_size(result.packed.file_bytes)} "
            "beside it.",
        ),
    ]


def pruning_brought(result: FitResult) -> Claim:
    """The loss of the winner beside the best rounding alone within the same budget."""
    winner, rounded = result.losses[WINNER], result.losses.get(ONLY_ROUNDED)
    zeros = sum("zeros" in kind for kind in result.kind_of.values())
    used = f"{zeros} of {len(result.kind_of)} matrices of the winner have zeros."
    if rounded is None:
        said = f"No rounding alone fits into this budget. {used}"
        return Claim("Pruning brought", "the size", said, tone="good")
    sizes = (
        f"Rounding alone, at {binary_size(rounded.file_bytes)}: "
        f"{signed(rounded.loss_increase, 3)} nats."
    )
    if result.loss_is_bounded and winner != rounded:
        smaller = 1 - winner.file_bytes / rounded.file_bytes
        return Claim("Pruning brought", f"{percent(smaller)} of the size", f"{sizes} {used}")
    gain = rounded.loss_increase - winner.loss_increase
    if winner == rounded or abs(gain) <= LEAST_GAIN:
        return Claim("Pruning brought", "nothing", f"{sizes} {used}")
    part = f", {percent(gain / rounded.loss_increase)} of it" if rounded.loss_increase > 0 else ""
    value = f"{signed(-gain, 3)} nats"
    said = (
        f"{sizes} The winner loses {abs(gain):.3f} {'less' if gain > 0 else 'more'}{part}. {used}"
    )
    return Claim("Pruning brought", value, said, tone="good" if gain > 0 else "bad")


@dataclass(frozen=True)
class Cell:
    """A number of one run.

    Attributes:
        value: the number with its standard error.
        comparison: how it compares with the dense model, and how the model computed if others
            in the line computed otherwise.
        verdict: `worse`, `better` or `same` after a test of significance; empty without one.
        protocol_id: the whole id.
    """

    value: str
    comparison: str = ""
    verdict: str = ""
    protocol_id: str = ""

    def with_comparison(self, said: str) -> Cell:
        """The cell with one more comparison, unless it is empty."""
        return replace(self, comparison=", ".join(filter(None, (self.comparison, said))))


@dataclass
class QualityRow:
    """One measure, with the number of each run.

    Attributes:
        measure: the measure and its data.
        better: whether `higher` or `lower` is better.
        chance: the score of guessing; empty if there is none.
        dense: the number of the dense model; empty if it was not measured.
        protocol_id: what was judged; numbers with different ids cannot be compared.
        protocol: what was judged, in words.
        cells: the numbers by name of the run.
    """

    measure: str
    better: str
    chance: str
    dense: str
    protocol_id: str = ""
    protocol: str = ""
    cells: dict[str, Cell] = field(default_factory=dict)


def quality_rows(runs: Sequence[ReportedRun]) -> list[QualityRow]:
    """The lines of the table, in the order of the runs.

    Numbers share a line only if the same was judged, and they are compared with the same dense
    model. Where the models of a line computed in different ways, the cells say how.
    """
    rows: dict[tuple[str, str, str], QualityRow] = {}
    for run in runs:
        if run.evaluation is None:
            continue
        for row, cell in _lines_of(run.evaluation):
            key = (row.measure, row.protocol_id, row.dense)
            rows.setdefault(key, row).cells[run.name] = cell
    for row in rows.values():
        if len({cell.protocol_id for cell in row.cells.values()}) > 1:
            for name, cell in row.cells.items():
                used = cell.protocol_id.removeprefix(judged_part(cell.protocol_id)).strip("-")
                said = f"computed in {used.replace('-', ', activations ')}" if used else ""
                row.cells[name] = cell.with_comparison(said)
    return list(rows.values())


def _lines_of(found: EvaluationRecord) -> Iterator[tuple[QualityRow, Cell]]:
    """The lines of one evaluation, each with its cell."""
    for perplexity in found.perplexity:
        yield _marked(perplexity, *_perplexity_line(perplexity))
    for divergence in found.divergence:
        for line in _divergence_lines(divergence):
            yield _marked(divergence, *line)
    for task in found.tasks:
        yield _marked(task, *_task_line(task))


def _marked(found: Measurement, row: QualityRow, cell: Cell) -> tuple[QualityRow, Cell]:
    """A line and its cell with the id. An inherited number names the model that was measured."""
    row.protocol_id = judged_part(found.protocol_id)
    row.protocol = ", ".join(f"{k} {v}" for k, v in found.protocol.items() if k not in COMPUTED)
    cell = replace(cell, protocol_id=found.protocol_id)
    if found.inherited_from is None:
        return row, cell
    said = f"not measured: of {bare_name(found.inherited_from)}, which has the same weights"
    return row, cell.with_comparison(said)


def _perplexity_line(found: PerplexityRecord) -> tuple[QualityRow, Cell]:
    """A perplexity. Its error is the error of the mean loss, as a factor."""
    reference = found.reference_perplexity
    dense = "" if reference is None else f"{reference:.2f}"
    row = QualityRow(f"perplexity, {bare_name(found.text)}", "lower", "", dense)
    error = found.perplexity * (found.standard_error or 0)
    value, comparison = with_error(found.perplexity, error or None, ".2f"), ""
    if reference and found.perplexity > 0:
        comparison = f"{signed(math.log(found.perplexity / reference), 3)} nats per token"
    return row, Cell(value, comparison)


def _divergence_lines(found: DivergenceRecord) -> Iterator[tuple[QualityRow, Cell]]:
    """The numbers for the distance of the predictions from the dense model's."""
    change = signed(found.loss_change, 4) + plus_minus(found.loss_change_standard_error)
    kl = with_error(found.kl, found.kl_standard_error)
    text, same = bare_name(found.text), percent(found.top1_agreement, 1)
    same += _points(found.top1_standard_error)
    if "kind" not in found.protocol:
        yield QualityRow(f"KL from dense, {text}", "lower", "", "0"), Cell(kl, "nats per token")
    yield QualityRow(f"same top token as dense, {text}", "higher", "", percent(1)), Cell(same)
    if found.acceptance is not None:
        accepted = percent(found.acceptance, 1) + _points(found.acceptance_standard_error)
        row = QualityRow(f"accepted as a draft of dense, {text}", "higher", "", percent(1))
        yield row, Cell(accepted)
    if "kind" not in found.protocol:
        row = QualityRow(f"change of loss, {text}", "lower", "", "0")
        yield row, Cell(change, "nats per token")


def _task_line(found: TaskRecord) -> tuple[QualityRow, Cell]:
    """The score on a task, with chance, the difference from dense, and its significance."""
    shots = f", {found.shots} shots" if found.shots else ""
    row = QualityRow(
        f"{found.task} ({found.metric}{shots}, {found.items} items)",
        "higher",
        percent(found.chance, 1),
        "" if found.reference_value is None else percent(found.reference_value, 1),
    )
    value = percent(found.value, 1) + _points(found.standard_error)
    comparisons, verdict = [], ""
    if found.difference is not None:
        error = _points(found.difference_standard_error)
        comparisons.append(f"{signed(100 * found.difference, 1)}{error} points")
        if found.significant is not None:
            verdict = "same"
            if found.significant:
                verdict = "better" if found.difference > 0 else "worse"
    if found.retention is not None:
        comparisons.append(f"{percent(found.retention)} kept")
    elif found.reference_value is not None:
        comparisons.append("dense is near chance")
    return row, Cell(value, ", ".join(comparisons), verdict)


def _points(error: float | None) -> str:
    """A standard error of a fraction, in points."""
    return plus_minus(error and 100 * error, ".1f")


def evidence(run: ReportedRun) -> str:
    """The sections headline, quality, speed and findings, as far as they were measured."""
    lines = [f"- **{c.title} {c.value}**: {c.description}" for c in claims(run) if c.measured]
    headline = "\n".join(["## In short", "", *lines]) if lines else ""
    parts = [headline, _quality_section(run), _speed_section(run), _findings_section(run)]
    return "\n\n".join(part for part in parts if part)


def _quality_section(run: ReportedRun) -> str:
    """The table of quality."""
    rows = quality_rows([run])
    if not rows:
        return ""
    said = {"same": "no significant difference", "": ""}
    lines = []
    for row in rows:
        cell = row.cells[run.name]
        cell = cell.with_comparison(said.get(cell.verdict, f"significantly {cell.verdict}"))
        numbers = (row.measure, row.chance, row.dense, cell.value)
        lines.append((*numbers, cell.comparison, f"`{cell.protocol_id}`"))
    columns: tuple[str, ...] = (
        "measure",
        "chance",
        "dense",
        "this model",
        "beside dense",
        "protocol",
    )
    if not any(row.chance for row in rows):  # nothing was guessed at
        columns, lines = (columns[0], *columns[2:]), [(x[0], *x[2:]) for x in lines]
    return (
        "## Quality\n\n± is one standard error. Numbers can be compared if their protocol ids "
        "begin alike; what follows says how the model computed.\n\n"
        + markdown_table(columns, lines, range(1, len(columns) - 2))
    )


def _speed_section(run: ReportedRun) -> str:
    """Tokens per second of each way to run the model."""
    ran = [c for c in run.bench.contenders if c.tokens_per_second] if run.bench else []
    if not ran or run.bench is None:
        return ""
    p = run.bench.protocol
    rows = [
        (
            x.contender,
            f"{x.tokens_per_second:.1f}",
            binary_size(x.resident_bytes) if x.resident_bytes else "",
        )
        for x in ran
    ]
    return (
        f"## Speed\n\nBatch 1 on {p.get('cpu', '?')}, {p.get('threads', '?')} threads; "
        f"{p.get('prompt_tokens', '?')} tokens read, {p.get('new_tokens', '?')} written.\n\n"
        + markdown_table(("", "tokens a second", "memory"), rows, range(1, 3))
    )


def _findings_section(run: ReportedRun) -> str:
    """The findings of a diagnosis."""
    if run.diagnosis is None:
        return ""
    lines = [
        f"- {f.severity}: {f.id}, {f.where}. {f.evidence} Remedy: {f.remedy}"
        for f in run.diagnosis.findings
    ]
    found = "\n".join(lines or ["Nothing was found."])
    return f"## Diagnosis\n\n{without_folders(found)}"


def push_card(card: str, repo: str, run: ReportedRun | None, base_model: str | None = None) -> str:
    """The text of README.md for the hub.

    Licence, language and base model are those of the folder's card. Results are added as sections,
    and in the form that the hub reads (`model-index`); each names its protocol.

    Args:
        card: the card of the folder.
        repo: the repository.
        run: the records of the folder; None without a manifest.
        base_model: the base model on the hub; None for the one that the card names.
    """
    front, body = split_card(card)
    data: dict[str, Any] = (yaml.safe_load(front.strip("-\n")) or {}) if front else {}
    tags = data.get("tags") or []
    data["tags"] = list(dict.fromkeys([*tags, OURS]))
    data.setdefault("library_name", "transformers")
    data.setdefault("pipeline_tag", "text-generation")
    data |= {"base_model": base_model} if base_model else {}
    results = _hub_results(run.evaluation) if run and run.evaluation else []
    if results:
        data["model-index"] = [{"name": Path(repo).name, "results": results}]
    measured = evidence(run) if run is not None else ""
    if measured and measured not in body:
        body = f"{body.rstrip()}\n\n{measured}\n"
    header = yaml.safe_dump(data, sort_keys=False, allow_unicode=True)
    return f"---\n{header}---\n{body}"


def _hub_results(found: EvaluationRecord) -> list[dict[str, Any]]:
    """Perplexities and scores in the form that the hub reads."""
    numbers = [
        *((x.text, "perplexity", x.perplexity, "perplexity", x) for x in found.perplexity),
        *((x.task, x.metric, x.value, f"{x.metric}, {x.shots} shots", x) for x in found.tasks),
    ]
    return [
        {
            "task": {"type": "text-generation"},
            "dataset": {"type": data, "name": data},
            "metrics": [
                {"type": kind, "value": value, "name": f"{name}, protocol {one.protocol_id}"}
            ],
        }
        for data, kind, value, name, one in numbers
    ]


def missing_in(card: str) -> list[str]:
    """What the head of a card lacks, and how to add it."""
    front, _ = split_card(card)
    data = yaml.safe_load(front.strip("-\n")) or {} if front else {}
    notes = {
        "license": "the card names no licence: add it to README.md",
        "base_model": "the card names no base model: add --base-model OWNER/NAME",
    }
    return [note for key, note in notes.items() if not data.get(key)]
