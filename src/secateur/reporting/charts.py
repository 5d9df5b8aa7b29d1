"""Charts as data: what is shown, before anyone decides how it is drawn.

The report draws them into its page (`report/drawing.py`), and `plots.py` into PNG and SVG files.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

__all__ = ["Bar", "BarChart", "Chart", "HeatMap", "LineChart", "Mark", "Series"]


@dataclass(frozen=True)
class Mark:
    """One point of a line.

    Attributes:
        x: along the axis.
        y: the value; marks that are not finite are not drawn.
        label: a few letters beside the point; may be empty.
        told: the whole point in words, for whoever points at it.
    """

    x: float
    y: float
    label: str = ""
    told: str = ""


@dataclass(frozen=True)
class Series:
    """Marks that belong together; `joined` by a line, or each by itself."""

    name: str
    marks: tuple[Mark, ...]
    joined: bool = True

    @property
    def drawn(self) -> tuple[Mark, ...]:
        """The marks that have a place, from left to right."""
        finite = (m for m in self.marks if math.isfinite(m.x) and math.isfinite(m.y))
        return tuple(sorted(finite, key=lambda m: m.x))


@dataclass(frozen=True)
class LineChart:
    """Lines over an axis.

    Attributes:
        key: names the chart in the page and in file names.
        title: what it shows.
        x_label: of the axis below.
        y_label: of the axis at the left.
        series: the lines.
        reference: a name and a value to hold them against, drawn dashed.
        log_y: whether the upright axis counts in factors.
        percent_x: whether the axis below shows fractions as percent.
        note: what has to be known to read it.
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
        """How many marks are drawn."""
        return sum(len(series.drawn) for series in self.series)


@dataclass(frozen=True)
class HeatMap:
    """A value for each row and column, None where there is none.

    Attributes:
        key: names the chart in the page and in file names.
        title: what it shows.
        rows: their names.
        columns: their names.
        values: one list a row.
        log: whether the colours count in factors.
        percent: whether values are fractions, shown as percent.
        note: what has to be known to read it.
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
        """How many cells hold a value."""
        return sum(value is not None for row in self.values for value in row)

    @property
    def span(self) -> tuple[float, float]:
        """The least and the largest value that the colours tell apart."""
        found = [v for row in self.values for v in row if v is not None and math.isfinite(v)]
        if self.log:
            found = [v for v in found if v > 0]
        return (min(found), max(found)) if found else (0.0, 0.0)

    def share(self, value: float) -> float:
        """Where between least and largest a value lies, 0 to 1; one half if all are alike."""
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
        label: what it is.
        value: its length.
        text: the value in words.
        ours: whether it is what the page is about, and not what it is held against.
        least: of several measurements.
        most: of several measurements.
    """

    label: str
    value: float
    text: str
    ours: bool = False
    least: float | None = None
    most: float | None = None


@dataclass(frozen=True)
class BarChart:
    """Bars that begin at nought.

    Attributes:
        key: names the chart in the page and in file names.
        title: what it shows.
        unit: of the values.
        bars: from top to bottom.
        note: what has to be known to read it.
    """

    key: str
    title: str
    unit: str
    bars: tuple[Bar, ...] = field(default=())
    note: str = ""

    @property
    def points(self) -> int:
        """How many bars there are."""
        return len(self.bars)


Chart = LineChart | HeatMap | BarChart
