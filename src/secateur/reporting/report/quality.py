"""The table of quality: one line for each number that can be compared across runs."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

from secateur.evaluation.perplexity import COMPUTED, judged_part
from secateur.reporting.report.records import ReportedRun
from secateur.reporting.tables import bare_name, percent, signed
from secateur.runs.records.measured import (
    DivergenceRecord,
    EvaluationRecord,
    Measurement,
    PerplexityRecord,
    TaskRecord,
)


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
            row.cells = {name: _with_computing(cell) for name, cell in row.cells.items()}
    return list(rows.values())


def _with_computing(cell: Cell) -> Cell:
    """A cell that says how its model computed."""
    computed = cell.protocol_id.removeprefix(judged_part(cell.protocol_id)).strip("-")
    said = f"computed in {computed.replace('-', ', activations ')}" if computed else ""
    return replace(cell, comparison=", ".join(filter(None, (cell.comparison, said))))


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
    return row, replace(cell, comparison=", ".join(filter(None, (cell.comparison, said))))


def _perplexity_line(found: PerplexityRecord) -> tuple[QualityRow, Cell]:
    """A perplexity. Its error is the error of the mean loss, as a factor."""
    reference = found.reference_perplexity
    row = QualityRow(
        f"perplexity, {bare_name(found.text)}",
        "lower",
        "",
        "" if reference is None else f"{reference:.2f}",
    )
    error = found.perplexity * (found.standard_error or 0)
    value = f"{found.perplexity:.2f}" + (f" ± {error:.2f}" if error else "")
    comparison = ""
    if reference and found.perplexity > 0:
        comparison = f"{signed(math.log(found.perplexity / reference), 3)} nats a token"
    return row, Cell(value, comparison)


def _divergence_lines(found: DivergenceRecord) -> Iterator[tuple[QualityRow, Cell]]:
    """Three numbers for the distance of the predictions from the dense model's."""
    change = _plus_minus(signed(found.loss_change, 4), found.loss_change_standard_error, ".4f")
    kl = _plus_minus(f"{found.kl:.4f}", found.kl_standard_error, ".4f")
    yield (
        QualityRow(f"KL from dense, {bare_name(found.text)}", "lower", "", "0"),
        Cell(kl, "nats a token"),
    )
    yield (
        QualityRow(f"same top token as dense, {bare_name(found.text)}", "higher", "", percent(1)),
        Cell(percent(found.top1_agreement, 1) + _points_error(found.top1_standard_error)),
    )
    yield (
        QualityRow(f"change of loss, {bare_name(found.text)}", "lower", "", "0"),
        Cell(change, "nats a token"),
    )


def _task_line(found: TaskRecord) -> tuple[QualityRow, Cell]:
    """The score on a task, with chance, the difference from dense, and its significance."""
    shots = f", {found.shots} shots" if found.shots else ""
    row = QualityRow(
        f"{found.task} ({found.metric}{shots}, {found.items} items)",
        "higher",
        percent(found.chance, 1),
        "" if found.reference_value is None else percent(found.reference_value, 1),
    )
    value = percent(found.value, 1) + _points_error(found.standard_error)
    comparisons, verdict = [], ""
    if found.difference is not None:
        points = _plus_minus(
            signed(100 * found.difference, 1),
            _times_hundred(found.difference_standard_error),
            ".1f",
        )
        comparisons.append(f"{points} points")
        if found.significant is not None:
            verdict = "same"
            if found.significant:
                verdict = "better" if found.difference > 0 else "worse"
    if found.retention is not None:
        comparisons.append(f"{percent(found.retention)} kept")
    elif found.reference_value is not None:
        comparisons.append("dense is near chance")
    return row, Cell(value, ", ".join(comparisons), verdict)


def _plus_minus(value: str, error: float | None, form: str) -> str:
    """A value with its standard error, if it is known."""
    return value if error is None else f"{value} ± {error:{form}}"


def _points_error(error: float | None) -> str:
    """The standard error of a fraction, in percentage points."""
    return "" if error is None else f" ± {100 * error:.1f}"


def _times_hundred(value: float | None) -> float | None:
    """A fraction in percent."""
    return None if value is None else 100 * value
