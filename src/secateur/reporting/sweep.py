"""What `sweep` returns: perplexity against sparsity."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from secateur.evaluation.perplexity import judged_part, protocol_id
from secateur.reporting.charts import LineChart, Series
from secateur.reporting.fields import Result, blocks_of, filled, of_record
from secateur.reporting.next_steps import command, free_place
from secateur.reporting.tables import (
    Block,
    Line,
    Table,
    bare_name,
    binary_size,
    markdown,
    next_steps,
)
from secateur.runs.measured import Sweep
from secateur.sparsity.methods import methods
from secateur.sparsity.patterns import parse_pattern


class SweepResult(Result):
    """All measurements of a sweep.

    Attributes:
        sweep: the content of `sweep.json`.
        folder: the folder of the sweep.
    """

    sweep: Sweep
    folder: Path

    dense: ClassVar[Any] = of_record("sweep.dense.perplexity", "Of the dense model, by text.")
    points: ClassVar[Any] = of_record("sweep.points", "The pruned models, as planned.")
    failures: ClassVar[Any] = of_record("sweep.failures", "The points that failed, and why.")

    @property
    def texts(self) -> list[str]:
        """The texts that the models were evaluated on."""
        return [*self.dense]

    @property
    def exit_code(self) -> int:
        """1 if a point failed."""
        return int(bool(self.failures))

    def to_json(self) -> dict[str, Any]:
        """The content of `sweep.json`."""
        return self.sweep.to_json()

    def tables(self) -> list[Block]:
        """The table, and what failed; in brackets the excess loss."""
        dense = ("dense", "", "", *(f"{x:.2f}" for x in self.dense.values()), "", "")
        columns = ("method", "pattern", "zeros", *map(bare_name, self.texts), "time", "peak memory")
        rows = [
            (
                *(point.method, point.pattern, f"{point.zeros:.2%}"),
                *(f"{point.perplexity[t]:.2f} ({point.excess[t]:.3f})" for t in self.texts),
                *(f"{point.seconds:.0f} s", binary_size(point.peak_resident_bytes)),
            )
            for point in self.points
        ]
        table = Table.of(self.sweep.model, columns, [dense, *rows], numbers=2)
        return [table, *blocks_of("SweepResult", self)]

    def following(self) -> list[Block]:
        """Where the files are, and the next commands."""
        folder, points = self.folder, self.points
        said = Line(f"sweep.json, .md, .png and .svg are in {folder}")
        files = {"the curves": folder / "sweep.png", "the table": folder / "sweep.md"}
        places = {what: file for what, file in files.items() if file.exists()}
        if not points:
            return [said, *next_steps(places, {})]
        # the least excess loss among the points whose zeros are closest to one half
        best = min(points, key=lambda p: (round(abs(p.zeros - 0.5), 2), sum(p.excess.values())))
        chosen = ["--method" if best.method in methods else "--effort", best.method]
        chosen += ["--pattern", best.pattern] if best.pattern != "unstructured" else []
        if parse_pattern(best.pattern).sparsity is None:
            chosen += ["--sparsity", f"{best.sparsity:g}"]
        if self.sweep.calibration is not None:
            chosen += ["--calibration", str(folder / "windows.safetensors")]
        output = free_place(f"{folder}-{Path(best.notes).name}")
        what = f"make the model with {best.zeros:.0%} zeros that lost least"
        making = command("prune", self.sweep.model, *chosen, "--output", output)
        return [said, *next_steps(places, {what: making})]

    def markdown(self) -> str:
        """The table with its conditions, in Markdown."""
        protocols = [
            f"Perplexity on {bare_name(text)}, protocol `{protocol_id('ppl', protocol)}`: "
            + ", ".join(f"{key} {value}" for key, value in protocol.items())
            for text, protocol in self.sweep.protocol.items()
        ]
        windows = "Calibration: {samples} windows of {sequence_length} tokens of {source}."
        machine = "Measured on {cpu}, {threads} threads, torch {torch}."
        lines = [
            f"# {bare_name(self.sweep.model)}: perplexity against sparsity",
            markdown(self.tables()),
            *protocols,
            filled(windows, self.sweep.calibration or {}),
            filled(machine, self.sweep.environment),
        ]
        return "\n\n".join(filter(None, lines)) + "\n"

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
