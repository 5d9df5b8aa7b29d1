"""The results of a run or a fit as claims: smaller, faster, quality kept; what pruning brought.

A claim has a number only if it was measured. Otherwise it names the command that measures it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from secateur.reporting.charts import LineChart
from secateur.reporting.report.records import ReportedFit, ReportedRun
from secateur.reporting.results.evaluate import GAIN
from secateur.reporting.results.fit import ONLY_ROUNDED, WINNER, FitResult
from secateur.reporting.results.next_steps import command
from secateur.reporting.tables import (
    Table,
    bare_name,
    binary_size,
    counted,
    duration,
    percent,
    signed,
)
from secateur.runs.records import Compression
from secateur.runs.records.measured import (
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
        saved = 1 - cut.after.file_bytes / cut.before.file_bytes
        return Claim(
            "Smaller by",
            percent(saved),
            f"{binary_size(cut.after.file_bytes)} instead of "
            f"{binary_size(cut.before.file_bytes)} in the same dtype; "
            f"{percent(cut.decoder_removed, 2)} of the decoder was cut out.",
            tone=_gain_tone(saved > 0),
        )
    if found is None:
        return _not_packed(run)
    saved = 1 - found.ratio
    dense = f"{binary_size(found.bfloat16_bytes)} in dense bfloat16"
    against = f"{binary_size(found.file_bytes)} instead of {dense}"
    return Claim(
        "Smaller by",
        percent(saved),
        f"{against}{_parts_of_saving(found)}.",
        tone=_gain_tone(saved > 0),
    )


def _parts_of_saving(found: Compression) -> str:
    """How much of the saving is rounding, and how much the zeros that are not stored."""
    zeros = f"{percent(found.sparsity, 2)} zeros"
    whole, dense = found.bfloat16_bytes, found.dense_file_bytes["as here"]
    by_zeros = (dense - found.file_bytes) / whole
    if dense >= whole:
        return f"; all of it by leaving out {zeros}"
    values = " and ".join(dict.fromkeys(v for name in found.formats if (v := _values_in(name))))
    return (
        f": {percent((whole - dense) / whole)} by {values} alone ({binary_size(dense)}), "
        f"{percent(by_zeros)} more by leaving out {zeros}"
    )


def _values_in(stored: str) -> str | None:
    """The type of the values in the name of a format, such as `bitmask int4 g64`."""
    return next((word for word in stored.split() if word.startswith(("int", "float", "bf"))), None)


def _gain_tone(gained: bool) -> Tone:
    """The tone of a size: good if the files are smaller."""
    return "good" if gained else "bad"


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


def _speed_gain(run: ReportedRun) -> tuple[str, float, float] | None:
    """The fastest other contender, its tokens per second, and those of the packed model."""
    if run.bench is None:
        return None
    rates = {c.contender: c.tokens_per_second for c in run.bench.contenders if c.tokens_per_second}
    others = {name: rate for name, rate in rates.items() if not name.startswith("packed")}
    if "packed" not in rates or not others:
        return None
    best = max(others, key=lambda name: others[name])
    return best, others[best], rates["packed"]


def _faster(run: ReportedRun) -> Claim:
    """Tokens per second, compared with the fastest dense way to run the same model here."""
    found = _speed_gain(run)
    if found is None:
        failed = "" if run.bench is None else "The measurement had nothing to compare. "
        return Claim(
            "Faster by",
            "not measured",
            f"{failed}Timing it on your machine:",
            measured=False,
            command=run.timing(),
        )
    other, theirs, ours = found
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
    return Claim(
        "Quality kept",
        "not measured",
        "Judging it beside the dense model:",
        measured=False,
        command=run.judging(),
    )


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
    dense = f"dense {found.reference_perplexity:.2f} ({signed(excess, 3)} nats a token)"
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


@dataclass(frozen=True)
class FitView:
    """The data of a fit for the page.

    Attributes:
        name: of the folder.
        made: a line about the bounds and the work.
        claims: size, loss, and what pruning brought.
        chart: the frontier.
        tables: as the terminal shows them.
        broken: bounds that the result does not keep.
    """

    name: str
    made: str
    claims: list[Claim]
    chart: LineChart
    tables: list[Table]
    broken: list[str]


def fit_view(fit: ReportedFit) -> FitView:
    """The data of a fit for the page."""
    result = fit.result
    tables = [block for block in result.blocks() if isinstance(block, Table)]
    return FitView(
        fit.name,
        _fit_summary(result),
        _fit_claims(result),
        result.chart(),
        tables,
        result.broken,
    )


def _fit_summary(result: FitResult) -> str:
    """The bounds, how many candidates were measured, and how long it took."""
    bounds = [BOUNDS[one.option].format(one.format_value(one.wanted)) for one in result.checks]
    measured = len(result.singles) + len(result.frontier)
    made = len(result.finalists)
    return (
        f"fit: {', '.join(bounds) or 'no bound'}; {measured} candidates on the frontier, {made} "
        f"finalists; {duration(result.seconds)}"
    )


def _fit_claims(result: FitResult) -> list[Claim]:
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
            "nats per token above the dense model, on text that neither made nor chose it.",
            tone="good" if loss < 0.05 else "fair" if loss < 0.3 else "bad",
        ),
        pruning_brought(result),
    ]


def pruning_brought(result: FitResult) -> Claim:
    """The loss of the winner beside the best rounding alone within the same budget."""
    winner, rounded = result.losses[WINNER], result.losses.get(ONLY_ROUNDED)
    zeros = sum("zeros" in kind for kind in result.kind_of.values())
    used = f"{zeros} of {len(result.kind_of)} matrices of the winner have zeros."
    if rounded is None:
        return Claim(
            "Pruning brought",
            "the size",
            f"No rounding alone fits into this budget. {used}",
            tone="good",
        )
    sizes = (
        f"Rounding alone, at {binary_size(rounded.file_bytes)}: "
        f"{signed(rounded.loss_increase, 3)} nats."
    )
    gain = rounded.loss_increase - winner.loss_increase
    if winner == rounded or abs(gain) <= LEAST_GAIN:
        return Claim("Pruning brought", "nothing", f"{sizes} {used}")
    part = f", {percent(gain / rounded.loss_increase)} of it" if rounded.loss_increase > 0 else ""
    value = f"{signed(-gain, 3)} nats"
    said = (
        f"{sizes} The winner loses {abs(gain):.3f} {'less' if gain > 0 else 'more'}{part}. {used}"
    )
    return Claim("Pruning brought", value, said, tone="good" if gain > 0 else "bad")
