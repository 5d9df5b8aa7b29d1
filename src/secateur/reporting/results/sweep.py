"""What `sweep` returns: perplexity against sparsity, as tables, JSON, Markdown and CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from secateur.evaluation.perplexity import protocol_id
from secateur.reporting.charts import CurvePoint, LineChart, curve_charts
from secateur.reporting.results.next_steps import after_a_sweep
from secateur.reporting.tables import Block, Line, Result, Table, bare_name, binary_size, percent
from secateur.runs.records import Sweep, SweepPoint


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
            Line("in brackets: ln(perplexity) − ln(dense perplexity), nats a token", style="dim"),
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
            "perplexity), in nats a token.",
            "",
            markdown_row(self.columns),
            "|---|---|" + "---:|" * (len(self.columns) - 2),
            *(markdown_row(row) for row in self.rows()),
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


def markdown_row(cells: Sequence[str]) -> str:
    """A row of a Markdown table; bars within cells are escaped."""
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def judged_points(result: SweepResult, name: str = "") -> list[CurvePoint]:
    """The points of a sweep; `name` distinguishes its lines from those of other sweeps."""
    return [
        CurvePoint(
            model=result.sweep.model,
            text=text,
            protocol=result.sweep.protocol[text],
            series=" ".join(
                filter(None, (name, p.method, "" if p.pattern == "unstructured" else p.pattern))
            ),
            sparsity=p.zeros,
            perplexity=p.perplexity[text],
            dense=result.dense[text],
            joined=":" not in p.pattern,
        )
        for p in result.points
        for text in result.texts
    ]


def sweep_charts(results: Sequence[SweepResult]) -> list[LineChart]:
    """One chart for each text that sweeps were evaluated on."""
    return curve_charts(point for result in results for point in judged_points(result))
