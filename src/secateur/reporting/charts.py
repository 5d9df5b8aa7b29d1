"""Charts: what they show, as data, and how matplotlib draws them.

`save_plots` writes them into PNG and SVG files for papers and slides. `page_svg` returns the same
picture for a page, whose light and dark theme gives it its colours.
"""

from __future__ import annotations

import io
import math
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any, NamedTuple


class Series(NamedTuple):
    """Points (x, y) that belong together: `joined` by a line, or separate."""

    name: str
    points: tuple[tuple[float, float], ...]
    joined: bool = True


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
    def height(self) -> float:
        """In points."""
        return 230.0 + 18 * len(self.series)

    def draw(self, axes: Any) -> None:
        """Draw one line per series, and the reference as a dashed line."""
        from matplotlib.ticker import LogFormatter, PercentFormatter

        lines, names = [], []
        for number, series in enumerate(self.series):
            kind = number % len(COLORS)
            points = sorted(p for p in series.points if all(map(math.isfinite, p)))
            lines += axes.plot(
                [x for x, _ in points], [y for _, y in points], marker=SHAPES[kind],
                color=COLORS[kind], linestyle=STROKES[kind] if series.joined else "none",
            )  # fmt: skip
            names.append(series.name)
        if self.reference:
            name, value = self.reference
            lines.append(axes.axhline(value, color=SOFT, linestyle="--"))
            names.append(f"{name} {value:.4g}")
        if self.log_y:
            axes.set_yscale("log")
            axes.yaxis.set_major_formatter("{x:g}")
            axes.yaxis.set_minor_formatter(LogFormatter())
        if self.percent_x:
            axes.xaxis.set_major_formatter(PercentFormatter(1, decimals=0, symbol=" %"))
        axes.set(xlabel=self.x_label, ylabel=self.y_label)
        axes.grid(axis="y")
        # matplotlib leaves out names that begin with an underscore
        shown = [" " * name.startswith("_") + _shortened(name) for name in names]
        axes.legend(lines, shown, frameon=False, loc="upper left", bbox_to_anchor=(0, -0.2))


@dataclass(frozen=True)
class HeatMap:
    """A value for each matrix of each layer, None where there is none.

    Attributes:
        key: the name of the chart in the page and in file names.
        title: what it shows.
        rows: names of the matrices.
        columns: numbers of the layers.
        values: one list per row.
        log: whether the colour scale is logarithmic; values that are not above 0 stay empty then.
        note: what the reader has to know.
    """

    key: str
    title: str
    rows: tuple[str, ...]
    columns: tuple[int, ...]
    values: tuple[tuple[float | None, ...], ...]
    log: bool = False
    note: str = ""

    @property
    def height(self) -> float:
        """In points."""
        return 90.0 + 14 * len(self.rows)

    def draw(self, axes: Any) -> None:
        """Draw one cell for each matrix of each layer; those without a value stay empty."""
        values = [[math.nan if v is None else v for v in row] for row in self.values]
        cells = axes.imshow(
            values, aspect="auto", interpolation="none", norm="log" if self.log else None
        )
        axes.set_yticks(range(len(self.rows)), map(_shortened, self.rows))
        # at most ten numbers fit below the map
        step = math.ceil(len(self.columns) / 10)
        axes.set_xticks(range(0, len(self.columns), step), self.columns[::step])
        axes.set_xlabel("layer")
        axes.spines[:].set_visible(False)
        axes.figure.colorbar(cells, ax=axes, pad=0.02, format="%.3g")


class Bar(NamedTuple):
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
        bars: the bars from top to bottom.
        note: what the reader has to know.
    """

    key: str
    title: str
    bars: tuple[Bar, ...]
    note: str = ""

    @property
    def height(self) -> float:
        """In points."""
        return 12.0 + 24 * len(self.bars)

    def draw(self, axes: Any) -> None:
        """Draw bars from top to bottom, each with its value, and a line to its extremes."""
        places = range(len(self.bars))
        ends = [(bar.least or bar.value, bar.most or bar.value) for bar in self.bars]
        drawn = axes.barh(
            places,
            [bar.value for bar in self.bars],
            color=[COLORS[0] if bar.ours else PLAIN_BAR for bar in self.bars],
            height=0.6,
            xerr=[[abs(end - bar.value) for end, bar in zip(side, self.bars, strict=True)]
                  for side in zip(*ends, strict=True)],
            ecolor=INK,
        )  # fmt: skip
        axes.bar_label(drawn, [_shortened(bar.text) for bar in self.bars], padding=6)
        axes.set_yticks(places, [_shortened(bar.label) for bar in self.bars])
        axes.margins(x=0.3)  # room for the values behind the bars
        axes.set_ylim(len(self.bars) - 0.5, -0.5)  # the first bar is at the top
        axes.tick_params(length=0, labelbottom=False)
        axes.spines[:].set_visible(False)


Chart = LineChart | HeatMap | BarChart

COLORS = ("#0f7a52", "#c2502f", "#3b5ba5", "#8a4f9e", "#a87400", "#4d5a5f")
"""Colours that people with red-green blindness can distinguish. Shapes and strokes differ too."""
SHAPES = ("o", "s", "^", "D", "v", "P")
STROKES = ("-", (0, (6, 2)), (0, (1.5, 1.5)), (0, (6, 2, 1.5, 2)), (0, (3, 1)), (0, (8, 3)))
INK, SOFT, RULE, PLAIN_BAR = "#1d2421", "#5b645f", "#e2e0d6", "#c6c8bf"
VARIABLES = {
    **{color: f"var(--s{number})" for number, color in enumerate(COLORS)},
    INK: "var(--ink)",
    SOFT: "var(--soft)",
    RULE: "var(--line)",
    PLAIN_BAR: "var(--bar)",
}
"""The colours of the page's style sheet, by their value in the light theme."""
WIDTH, TITLE = 360.0, 24.0
"""The width of a chart, and the height of its title, in points."""
LONGEST = 34
"""The most letters of a name."""


def page_svg(chart: Chart) -> str:
    """A chart as an SVG element for the report's page."""
    written = io.StringIO()
    unsaid = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    with _style({"svg.fonttype": "none", "svg.hashsalt": f"{chart.key} {chart.title}"}):
        figure = _figure([chart], titles=False)
        figure.savefig(written, format="svg", transparent=True, metadata=unsaid)
    _, _, drawn = written.getvalue().partition("<svg ")
    for light, variable in VARIABLES.items():
        drawn = drawn.replace(light, variable)
    drawn = re.sub(r' id="[\w.]+_\d+"', "", drawn)  # another chart of the page has the same names
    return f'<svg role="img" aria-label="{escape(_printable(chart.title))}" {drawn}'


def save_plots(charts: Sequence[Chart], stem: Path) -> list[Path]:
    """Draw charts side by side into STEM.png and STEM.svg.

    Args:
        charts: at least one chart.
        stem: path of the files, without their ending.

    Returns:
        The written files.
    """
    files = [stem.with_name(f"{stem.name}.{kind}") for kind in ("png", "svg")]
    with _style({"svg.hashsalt": "secateur"}):
        figure = _figure(charts, titles=True)
        figure.savefig(files[0], dpi=160, metadata={"Software": None})
        figure.savefig(files[1], metadata={"Date": None})
    return files


@contextmanager
def _style(more: dict[str, Any]) -> Iterator[None]:
    from matplotlib import rc_context

    style: Any = {
        "font.size": 11, "text.parse_math": False, "text.color": INK, "axes.edgecolor": SOFT,
        "axes.labelcolor": SOFT, "axes.axisbelow": True, "axes.spines.top": False,
        "axes.spines.right": False, "grid.color": RULE, "xtick.color": SOFT, "ytick.color": SOFT,
        **more,
    }  # fmt: skip
    with rc_context(style), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the bundled font lacks some scripts
        yield


def _figure(charts: Sequence[Chart], *, titles: bool) -> Any:
    """Charts side by side."""
    from matplotlib.figure import Figure  # pyplot would need a display and global state

    height = max(chart.height for chart in charts) + TITLE * titles
    figure = Figure(figsize=(len(charts) * WIDTH / 72, height / 72), layout="constrained")
    for axes, chart in zip(figure.subplots(1, len(charts), squeeze=False)[0], charts, strict=True):
        chart.draw(axes)
        if titles:
            axes.set_title(_printable(chart.title), loc="left", fontweight="bold")
    return figure


def _printable(text: str) -> str:
    """A text without characters that no picture can show, and no XML."""
    return "".join(
        c if c.isprintable() or c == "\u00a0" else "\N{REPLACEMENT CHARACTER}" for c in text
    )


def _shortened(text: str) -> str:
    """A text without its middle, if it is long."""
    text, half = _printable(text), LONGEST // 2
    return text if len(text) <= LONGEST else f"{text[:half]}…{text[1 - half :]}"
