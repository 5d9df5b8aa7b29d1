"""What `sweep` returns: perplexity against sparsity, as tables, JSON, Markdown and CSV."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from secateur.evaluation.perplexity import judged_part, protocol_id
from secateur.reporting.charts import LineChart, Series
from secateur.reporting.next_steps import after_a_sweep
from secateur.reporting.tables import (
    Block,
    Line,
    Result,
    Table,
    bare_name,
    binary_size,
    markdown_table,
    percent,
)
from secateur.runs.records.measured import Sweep, SweepPoint


@dataclass(frozen=True, repr=False)
class SweepResult(Result):
    """All measurements of a sweep.

    Attributes:
        sweep: the content of `sweep.json`.
        folder: the folder of the sweep.
    """

    sweep: Sweep
    folder: Path

    @property
    def texts(self) -> list[str]:
        """The texts that the models were evaluated on."""
        return list(self.dense)

    @property
    def points(self) -> Sequence[SweepPoint]:
        """The pruned models, in the order of the plan."""
        return self.sweep.points

    @property
    def failures(self) -> Sequence[dict[str, Any]]:
        """The points that failed, and the reasons."""
        return self.sweep.failures

    @property
    def dense(self) -> dict[str, float]:
        """The perplexity of the dense model, by text."""
        return self.sweep.dense.perplexity

    def to_json(self) -> dict[str, Any]:
        """The content of `sweep.json`."""
        return self.sweep.to_json()

    def blocks(self) -> Sequence[Block]:
        """The table, failures, and where the files are."""
        failures = [
            f"failed: {x['method']} {x['pattern']} {x['sparsity']:g}: {x['what']}"
            + (f" ({x['where']})" if x["where"] else "")
            for x in self.failures
        ]
        return [
            Table.of(self.sweep.model, self.columns, self.rows(), numbers=2),
            Line("in brackets: ln(perplexity) − ln(dense perplexity), nats per token", style="dim"),
            *(Line(failure, style="red") for failure in failures),
            Line(f"sweep.json, .md, .csv, .png and .svg are in {self.folder}"),
            *after_a_sweep(self.folder, self.sweep),
        ]

    def rows(self) -> list[list[str]]:
        """Table rows for people: method, pattern, zeros, then each text, seconds and memory."""
        cells = (f"{self.dense[text]:.2f}" for text in self.texts)
        dense = ["dense", "", "", *cells, "", ""]
        return [dense, *(self.row(point) for point in self.points)]

    def row(self, point: SweepPoint) -> list[str]:
        """One row of that table; in brackets the excess loss."""
        cells = (f"{point.perplexity[t]:.2f} ({point.excess[t]:.3f})" for t in self.texts)
        size = binary_size(point.peak_resident_bytes)
        zeros = percent(point.zeros, 2)
        return [point.method, point.pattern, zeros, *cells, f"{point.seconds:.0f} s", size]

    @property
    def columns(self) -> list[str]:
        """The column names of that table."""
        return ["method", "pattern", "zeros", *map(bare_name, self.texts), "time", "peak memory"]

    def markdown(self) -> str:
        """The table with its conditions and explanations, in Markdown."""
        lines = [
            f"# {bare_name(self.sweep.model)}: perplexity against sparsity",
            "",
            "Made by `secateur sweep`. In brackets the excess loss, ln(perplexity) − ln(dense "
            "perplexity), in nats per token.",
            "",
            markdown_table(self.columns, self.rows(), range(2, len(self.columns))),
            "",
        ]
        for failure in self.failures:
            lines += [f"- failed: {failure['method']}, {failure['pattern']}: {failure['what']}", ""]
        for text in self.texts:
            name = protocol_id("ppl", self.sweep.protocol[text])
            protocol = ", ".join(f"{k} {v}" for k, v in self.sweep.protocol[text].items())
            lines += [f"Perplexity on {bare_name(text)}, protocol `{name}`: {protocol}.", ""]
        if self.sweep.calibration:
            windows = self.sweep.calibration
            lines += [
                f"Calibration: {windows['samples']} windows of {windows['sequence_length']} tokens "
                f"of {windows['source']}, the same for all points.",
                "",
            ]
        machine = self.sweep.environment
        lines.append(f"{machine['cpu']}, {machine['threads']} threads, torch {machine['torch']}.")
        return "\n".join(lines) + "\n"

    def csv(self) -> str:
        """One line per point, with unrounded numbers, as CSV."""
        stream = io.StringIO()
        writer = csv.writer(stream, lineterminator="\n")
        cells = [name for t in self.texts for name in (f"perplexity {t}", f"excess {t}")]
        head = ["method", "pattern", "sparsity", "zeros", *cells, "seconds", "peak_resident_bytes"]
        writer.writerow(head)
        dense = [value for text in self.texts for value in (self.dense[text], 0.0)]
        writer.writerow(["dense", "", 0.0, "", *dense, "", ""])
        for p in self.points:
            own = [value for text in self.texts for value in (p.perplexity[text], p.excess[text])]
            writer.writerow(
                [p.method, p.pattern, p.sparsity, p.zeros, *own, p.seconds, p.peak_resident_bytes]
            )
        return stream.getvalue()

    def curve_points(self, name: str = "") -> list[CurvePoint]:
        """The points as marks of a chart; `name` distinguishes them from those of other sweeps."""
        return [
            CurvePoint(
                model=self.sweep.model,
                text=text,
                protocol=self.sweep.protocol[text],
                series=" ".join(
                    filter(None, (name, p.method, "" if p.pattern == "unstructured" else p.pattern))
                ),
                sparsity=p.zeros,
                perplexity=p.perplexity[text],
                dense=self.dense[text],
                joined=":" not in p.pattern,
            )
            for p in self.points
            for text in self.texts
        ]


@dataclass(frozen=True)
class CurvePoint:
    """One perplexity of one pruned model.

    Attributes:
        model: the dense model, whose tokenizer the perplexity depends on.
        text: the text that the perplexity was measured on.
        protocol: how it was measured.
        series: the line that the point belongs to.
        sparsity: the removed fraction of the decoder: zeros in its matrices, or cut out.
        perplexity: the value.
        dense: perplexity of the dense model, if it was measured.
        joined: whether the points of the series are joined by a line.
        cut: whether units were cut out of the model.
    """

    model: str
    text: str
    protocol: dict[str, Any] = field(compare=False)
    series: str
    sparsity: float
    perplexity: float
    dense: float | None = None
    joined: bool = True
    cut: bool = False

    @property
    def alike(self) -> tuple[Any, ...]:
        """A key that is equal for perplexities that can be compared."""
        return self.model, judged_part(protocol_id("ppl", self.protocol))


def curve_charts(points: Iterable[CurvePoint]) -> list[LineChart]:
    """One chart for each set of comparable perplexities with at least two sparsities."""
    groups: dict[tuple[Any, ...], list[CurvePoint]] = {}
    for point in points:
        if math.isfinite(point.perplexity) and point.perplexity > 0:
            groups.setdefault(point.alike, []).append(point)
    several = [g for g in groups.values() if len({round(p.sparsity, 2) for p in g}) > 1]
    return [_chart_of(number, group) for number, group in enumerate(several, start=1)]


def _chart_of(number: int, group: Sequence[CurvePoint]) -> LineChart:
    """The chart of a set of comparable perplexities."""
    first = group[0]
    series: dict[str, list[CurvePoint]] = {}
    for point in group:
        series.setdefault(point.series, []).append(point)
    dense = next((point.dense for point in group if point.dense), None)
    protocol = first.protocol
    return LineChart(
        key=f"perplexity-{number}",
        title=f"{bare_name(first.model)}: perplexity on {bare_name(first.text)}",
        x_label="part of the decoder that is zero or cut out"
        if any(point.cut for point in group)
        else "zeros in the decoder's matrices",
        y_label="perplexity (log)",
        series=tuple(
            Series(
                name, tuple((p.sparsity, p.perplexity) for p in own), own[0].joined and len(own) > 1
            )
            for name, own in series.items()
        ),
        reference=None if dense is None else ("dense", dense),
        log_y=True,
        percent_x=True,
        note=f"{protocol.get('windows', '?')} windows of {protocol.get('sequence_length', '?')} "
        f"tokens of {bare_name(str(protocol.get('dataset', first.text)))}, protocol "
        f"{judged_part(protocol_id('ppl', protocol))}. Lower is better.",
    )
