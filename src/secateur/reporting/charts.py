"""Charts as data: what they show, independent of how they are drawn.

`drawing.py` draws them for the report page, and `plots.py` into PNG and SVG files.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from secateur.evaluation.perplexity import judged_part, protocol_id
from secateur.reporting.tables import bare_name, percent, signed


@dataclass(frozen=True)
class Mark:
    """One point of a line.

    Attributes:
        x: the position on the x axis.
        y: the value; marks that are not finite are not drawn.
        label: a few letters beside the point; may be empty.
        description: the point in words, shown when the reader points at it.
    """

    x: float
    y: float
    label: str = ""
    description: str = ""


@dataclass(frozen=True)
class Series:
    """Marks that belong together: `joined` by a line, or separate."""

    name: str
    marks: tuple[Mark, ...]
    joined: bool = True

    @property
    def drawn(self) -> tuple[Mark, ...]:
        """The marks with finite coordinates, from left to right."""
        finite = (m for m in self.marks if math.isfinite(m.x) and math.isfinite(m.y))
        return tuple(sorted(finite, key=lambda m: m.x))


@dataclass(frozen=True)
class LineChart:
    """Lines over an axis.

    Attributes:
        key: the name of the chart in the page and in file names.
        title: what it shows.
        x_label: label of the x axis.
        y_label: label of the y axis.
        series: the lines.
        reference: name and value of a dashed line for comparison.
        log_y: whether the y axis is logarithmic.
        percent_x: whether the x axis shows fractions as percent.
        note: what the reader has to know.
    """

    key: str
    title: str
    x_label: str
    y_label: str
    series: tuple[Series, ...]
    reference: tuple[str, float] | None = None
    log_y: bool = False
    percent_x: bool = False
    note: str = ""

    @property
    def points(self) -> int:
        """Number of drawn marks."""
        return sum(len(series.drawn) for series in self.series)


@dataclass(frozen=True)
class HeatMap:
    """A value for each row and column, None where there is none.

    Attributes:
        key: the name of the chart in the page and in file names.
        title: what it shows.
        rows: names of the rows.
        columns: names of the columns.
        values: one list per row.
        log: whether the colour scale is logarithmic.
        percent: whether values are fractions, shown as percent.
        note: what the reader has to know.
    """

    key: str
    title: str
    rows: tuple[str, ...]
    columns: tuple[str, ...]
    values: tuple[tuple[float | None, ...], ...]
    log: bool = False
    percent: bool = False
    note: str = ""

    @property
    def points(self) -> int:
        """Number of cells with a value."""
        return sum(value is not None for row in self.values for value in row)

    @property
    def span(self) -> tuple[float, float]:
        """The smallest and the largest value of the colour scale."""
        found = [v for row in self.values for v in row if v is not None and math.isfinite(v)]
        if self.log:
            found = [v for v in found if v > 0]
        return (min(found), max(found)) if found else (0.0, 0.0)

    def share(self, value: float) -> float:
        """The position of a value on the colour scale, 0 to 1; 0.5 if all values are equal."""
        least, most = self.span
        if not math.isfinite(value):
            return 1.0
        if self.log:
            if value <= 0 or least <= 0:
                return 0.0
            value, least, most = math.log(value), math.log(least), math.log(most)
        if most - least <= 1e-9 * max(abs(most), abs(least), 1e-12):
            return 0.5
        return min(1.0, max(0.0, (value - least) / (most - least)))


@dataclass(frozen=True)
class Bar:
    """One bar.

    Attributes:
        label: its name.
        value: its length.
        text: the value in words.
        ours: whether it shows the page's own model, and not one for comparison.
        least: smallest of several measurements.
        most: largest of several measurements.
    """

    label: str
    value: float
    text: str
    ours: bool = False
    least: float | None = None
    most: float | None = None


@dataclass(frozen=True)
class BarChart:
    """Bars that begin at zero.

    Attributes:
        key: the name of the chart in the page and in file names.
        title: what it shows.
        unit: unit of the values.
        bars: the bars from top to bottom.
        note: what the reader has to know.
    """

    key: str
    title: str
    unit: str
    bars: tuple[Bar, ...] = field(default=())
    note: str = ""

    @property
    def points(self) -> int:
        """Number of bars."""
        return len(self.bars)

    @property
    def longest(self) -> float:
        """The end of the axis: the largest value, or the largest of the measurements behind it."""
        return max(bar.value if bar.most is None else bar.most for bar in self.bars)


Chart = LineChart | HeatMap | BarChart


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

    @property
    def described(self) -> str:
        """The point in words."""
        gone = "of the decoder cut out or zero" if self.cut else "zeros"
        words = (
            f"{self.series}: perplexity {self.perplexity:.2f} at {percent(self.sparsity, 2)} {gone}"
        )
        if self.dense:
            words += f", {signed(math.log(self.perplexity / self.dense), 3)} nats a token"
        return words


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
                name,
                tuple(
                    Mark(p.sparsity, p.perplexity, _short(p.perplexity), p.described) for p in own
                ),
                joined=own[0].joined and len(own) > 1,
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


def _short(value: float) -> str:
    """A perplexity as a short text."""
    return f"{value:.1f}" if value < 1000 else f"{value:,.0f}" if value < 1e6 else f"{value:.1e}"
