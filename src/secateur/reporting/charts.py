"""Charts: what they show, as data, and one way to draw them, with matplotlib.

`save_plots` writes them into PNG and SVG files for papers and slides. `page_svg` returns the same
picture for a page: its colours follow the page's light and dark theme, and its marks have tips.
"""

from __future__ import annotations

import io
import math
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from secateur.errors import RecipeError
from secateur.reporting.tables import percent


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

    def describe(self) -> str:
        """The axes and the lines in words."""
        lines = ", ".join(series.name for series in self.series)
        return f"{self.y_label} over {self.x_label}: {lines}"


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

    @cached_property
    def span(self) -> tuple[float, float]:
        """The smallest and the largest value of the colour scale."""
        found = [v for row in self.values for v in row if v is not None and math.isfinite(v)]
        if self.log:
            found = [v for v in found if v > 0]
        return (min(found), max(found)) if found else (0.0, 0.0)

    def format(self, value: float) -> str:
        """A value as text."""
        return percent(value, 1) if self.percent else f"{value:.3g}"

    def describe(self) -> str:
        """The size of the map in words."""
        return f"{len(self.rows)} matrices of {len(self.columns)} layers"

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

    def describe(self) -> str:
        """The bar in words."""
        several = self.least is not None and self.most is not None
        spread = f", {self.least:.1f} to {self.most:.1f}" if several else ""
        return f"{self.label}: {self.text}{spread}"


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

    def describe(self) -> str:
        """All bars in words."""
        return "; ".join(bar.describe() for bar in self.bars)


Chart = LineChart | HeatMap | BarChart

COLORS = ("#0f7a52", "#c2502f", "#3b5ba5", "#8a4f9e", "#a87400", "#4d5a5f")
"""Colours that people with red-green blindness can distinguish. Shapes and strokes differ too."""
SHAPES = ("o", "s", "^", "D", "v", "P")
STROKES = ("-", (0, (6, 2)), (0, (1.5, 1.5)), (0, (6, 2, 1.5, 2)), (0, (3, 1)), (0, (8, 3)))
PAPER, INK, SOFT, RULE, PLAIN_BAR = "#ffffff", "#1d2421", "#5b645f", "#e2e0d6", "#c6c8bf"
COLDEST, HOTTEST, HEATS = "#f2f1e4", "#0b5d3f", 41
"""The ends of the colours of a heat map and their number; a key of 50 would become an image."""
VARIABLES = {
    **{color: f"var(--s{number})" for number, color in enumerate(COLORS)},
    PAPER: "var(--card)",
    INK: "var(--ink)",
    SOFT: "var(--soft)",
    RULE: "var(--line)",
    PLAIN_BAR: "var(--bar)",
}
"""The colours of the page's style sheet, by their value in the light theme."""

WIDTH = 430.0
"""The width of a chart, in points."""
LABEL, NAME = 50, 28
"""The most letters of a bar's label and of a row's name; tips have all of them."""
MARK, LETTER, LINE = 11.0, 5.6, 12.0
"""The width of a mark with some space, and the size of a letter, in points."""

NO_MATPLOTLIB = '<p class="remark">Charts need matplotlib: pip install matplotlib</p>'

Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class _Drawn:
    """Something that the page treats apart: its class there, and a tip for each of its marks."""

    artist: Any
    kind: str
    tips: Sequence[str] = ()


def page_svg(chart: Chart) -> str:
    """A chart as an SVG element for the report's page; a sentence if there is no matplotlib."""
    try:
        with _style({"svg.fonttype": "none", "svg.hashsalt": f"secateur {chart.key}"}):
            figure, drawn = _draw([chart], titles=False)
            figure.patch.set_visible(False)
            for number, one in enumerate(drawn):
                one.artist.set_gid(f"drawn-{number}")
                one.artist.set_path_effects([])
            written = io.StringIO()
            figure.savefig(written, format="svg", metadata={"Date": None})
    except ImportError:
        return NO_MATPLOTLIB
    root = ElementTree.fromstring(written.getvalue())
    _fit_to_page(root)
    for number, one in enumerate(drawn):
        group = next((x for x in root.iter("g") if x.get("id") == f"drawn-{number}"), None)
        if group is not None:
            group.set("class", one.kind)
            _add_tips(group, one.tips)
    for group in root.iter("g"):
        group.attrib.pop("id", None)
    root.attrib = {"viewBox": root.get("viewBox", ""), "role": "img", "aria-label": chart.title}
    description = ElementTree.Element("desc")
    description.text = _printable(chart.describe())
    root.insert(0, description)
    return ElementTree.tostring(root, encoding="unicode")


def save_plots(charts: Sequence[Chart], stem: Path) -> list[Path]:
    """Draw charts side by side into STEM.png and STEM.svg.

    Args:
        charts: at least one chart.
        stem: path of the files, without their ending.

    Returns:
        The written files.

    Raises:
        RecipeError: matplotlib is not installed.
    """
    if find_spec("matplotlib") is None:
        raise RecipeError("charts need matplotlib", remedy="pip install matplotlib")
    files = [stem.with_name(f"{stem.name}.{kind}") for kind in ("png", "svg")]
    with _style({"svg.hashsalt": "secateur"}):
        figure, _ = _draw(charts, titles=True)
        figure.savefig(files[0], dpi=160, metadata={"Software": None})
        figure.savefig(files[1], metadata={"Date": None})
    return files


# -- with matplotlib -----------------------------------------------------------------------------


@contextmanager
def _style(more: dict[str, Any]) -> Iterator[None]:
    from matplotlib import rc_context

    style: Any = {
        "font.size": 10, "text.parse_math": False, "text.color": INK, "axes.edgecolor": SOFT,
        "axes.labelcolor": SOFT, "axes.facecolor": "none", "axes.axisbelow": True,
        "axes.spines.top": False, "axes.spines.right": False, "figure.facecolor": PAPER,
        "savefig.facecolor": "auto", "grid.color": RULE, "xtick.color": SOFT, "ytick.color": SOFT,
        "legend.labelcolor": INK, **more,
    }  # fmt: skip
    with rc_context(style), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the bundled font lacks some scripts
        yield


def _draw(charts: Sequence[Chart], *, titles: bool) -> tuple[Any, list[_Drawn]]:
    """Draw charts side by side into one figure."""
    from matplotlib.figure import Figure  # pyplot would need a display and global state

    height = max(map(_height_of, charts)) + (24 if titles else 0)
    size = (len(charts) * WIDTH / 72, height / 72)
    figure = Figure(figsize=size, layout="constrained")
    panels = figure.subplots(1, len(charts), squeeze=False)[0]
    drawn: list[_Drawn] = []
    for axes, chart in zip(panels, charts, strict=True):
        if titles:
            axes.set_title(_printable(chart.title), loc="left", fontweight="bold")
        if isinstance(chart, LineChart):
            drawn += _draw_lines(axes, chart)
        elif isinstance(chart, HeatMap):
            drawn += _draw_heat(axes, chart)
        else:
            drawn += _draw_bars(axes, chart)
    figure.draw_without_rendering()  # labels need the place of the axes
    figure.set_layout_engine("none")
    for axes, chart in zip(panels, charts, strict=True):
        if isinstance(chart, LineChart):
            drawn += _label_marks(axes, chart)
    return figure, drawn


def _height_of(chart: Chart) -> float:
    """The height of a chart in points."""
    if isinstance(chart, LineChart):
        return 270.0 + 15 * len(chart.series)
    if isinstance(chart, HeatMap):
        return 90.0 + 15 * len(chart.rows)
    return 30.0 + 32 * len(chart.bars)


def _draw_lines(axes: Any, chart: LineChart) -> list[_Drawn]:
    """Draw one line per series, and the reference as a dashed line."""
    from matplotlib.ticker import FuncFormatter, NullFormatter, PercentFormatter

    drawn = []
    for number, series in enumerate(chart.series):
        marks, kind = series.drawn, number % len(COLORS)
        [line] = axes.plot(
            [m.x for m in marks], [m.y for m in marks], marker=SHAPES[kind], markersize=7,
            markeredgecolor=PAPER, markeredgewidth=0.8, color=COLORS[kind], linewidth=1.8,
            linestyle=STROKES[kind] if series.joined else "none", clip_on=False, zorder=3,
        )  # fmt: skip
        drawn.append(_Drawn(line, f"s{kind}", [mark.description for mark in marks]))
    handles = [one.artist for one in drawn]
    names = [series.name for series in chart.series]
    if chart.reference:
        name, value = chart.reference
        dashes = (0, (4, 3))
        handles.append(axes.axhline(value, color=SOFT, linestyle=dashes, linewidth=1.2))
        names.append(f"{name} {value:.4g}")
    axes.margins(x=0.08, y=0.12)
    if chart.log_y and min(axes.dataLim.y0, axes.dataLim.y1) > 0:
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        low, high = axes.get_ylim()
        plain = FuncFormatter(lambda value, _: f"{value:g}")
        # a short range needs the minor ticks
        axes.yaxis.set_minor_formatter(plain if high / low < 20 else NullFormatter())
    if chart.percent_x:
        axes.xaxis.set_major_formatter(PercentFormatter(1, decimals=0, symbol=" %"))
    axes.set_xlabel(chart.x_label)
    axes.set_ylabel(chart.y_label, labelpad=8)
    axes.grid(visible=True, which="major", axis="y", linewidth=0.8)
    # matplotlib leaves out names that begin with an underscore
    shown = [" " * name.startswith("_") + _shortened(name, LABEL) for name in names]
    axes.legend(
        handles, shown, frameon=False, loc="upper left", bbox_to_anchor=(0, -0.16), borderpad=0
    )
    return drawn


def _label_marks(axes: Any, chart: LineChart) -> list[_Drawn]:
    """Set marks of one place side by side, and write the labels where they cover least."""
    from matplotlib.patheffects import withStroke

    to_points = axes.transData + axes.figure.dpi_scale_trans.inverted()
    scale = 72.0
    placed: list[tuple[float, float]] = []
    alone: list[tuple[float, float]] = []
    places: list[list[tuple[float, float]]] = []
    lines = axes.get_lines()
    for series, line in zip(chart.series, lines, strict=False):
        own = [tuple(scale * to_points.transform((m.x, m.y))) for m in series.drawn]
        if len(own) == 1:  # on a line the position shows the value
            [mark] = series.drawn
            before = alone.count((mark.x, mark.y))
            alone.append((mark.x, mark.y))
            own = [(own[0][0] + MARK * before, own[0][1])]
            x, y = to_points.inverted().transform([n / scale for n in own[0]])
            line.set_data([x], [mark.y])
        placed += own
        places.append(own)
    frame = tuple(72 / axes.figure.dpi * n for n in axes.bbox.extents)
    taken: list[Box] = [(x - 5, y - 5, x + 5, y + 5) for x, y in placed]
    drawn = []
    for number, (series, own) in enumerate(zip(chart.series, places, strict=True)):
        for mark, (x, y) in zip(series.drawn, own, strict=True):
            if mark.label:
                at = _free_place(x, y, _printable(mark.label), frame, taken)
                text = axes.annotate(
                    _printable(mark.label), at, xycoords="figure points", ha="center", va="center",
                    fontsize=8.5, color=COLORS[number % len(COLORS)], annotation_clip=False,
                    path_effects=[withStroke(linewidth=2.5, foreground=PAPER)], zorder=4,
                )  # fmt: skip
                drawn.append(_Drawn(text, "value"))
    return drawn


def _free_place(
    x: float, y: float, label: str, frame: Sequence[float], taken: list[Box]
) -> tuple[float, float]:
    """The centre of a label where it covers least, above its mark if possible."""
    half = LETTER * len(label) / 2
    left, bottom, right, top = frame
    inner = min(max(x, left + half), max(right - half, left + half))
    best, least = (inner, y + 13), math.inf
    sides = ((x + half + 8, y), (x - half - 8, y))
    for place in ((inner, y + 13), (inner, y - 13), *sides, (inner, y + 26), (inner, y - 26)):
        box = (place[0] - half, place[1] - LINE / 2, place[0] + half, place[1] + LINE / 2)
        inside = box[0] >= left and box[2] <= right and box[1] >= bottom and box[3] <= top + LINE
        overlaps = (
            max(min(box[2], other[2]) - max(box[0], other[0]), 0.0)
            * max(min(box[3], other[3]) - max(box[1], other[1]), 0.0)
            for other in taken
        )
        covered = sum(overlaps) + (0 if inside else 100)
        if covered < least:
            best, least, chosen = place, covered, box
    taken.append(chosen)
    return best


def _draw_heat(axes: Any, chart: HeatMap) -> list[_Drawn]:
    """Draw one cell for each row and column, crossed out if it has no value."""
    from matplotlib.colors import LinearSegmentedColormap

    colors = LinearSegmentedColormap.from_list("heat", [COLDEST, HOTTEST], N=HEATS)
    shares = [[math.nan if v is None else chart.share(v) for v in row] for row in chart.values]
    cells = axes.pcolormesh(
        shares, cmap=colors, vmin=0, vmax=1, edgecolors=PAPER, linewidth=0.6, clip_on=False
    )
    empty = [(x, y) for y, row in enumerate(chart.values) for x, v in enumerate(row) if v is None]
    across = [(x + step, y + 1 - step) for x, y in empty for step in (0.15, 0.85, math.nan)]
    if across:  # one line with gaps
        axes.plot(*zip(*across, strict=True), color=RULE, linewidth=1.5)
    tips = [
        f"{name}, layer {column}: {'not pruned' if value is None else chart.format(value)}"
        for name, values in zip(chart.rows, chart.values, strict=True)
        for column, value in zip(chart.columns, values, strict=True)
    ]
    axes.invert_yaxis()
    names = [_shortened(name, NAME) for name in chart.rows]
    axes.set_yticks([row + 0.5 for row in range(len(chart.rows))], names)
    step = max(1, (len(chart.columns) + 9) // 10)
    shown = range(0, len(chart.columns), step)
    axes.set_xticks([column + 0.5 for column in shown], [chart.columns[n] for n in shown])
    axes.set_xlabel("layer")
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    least, most = chart.span
    bar = axes.figure.colorbar(
        cells, ax=axes, orientation="horizontal", shrink=0.4, aspect=16, anchor=(0.0, 1.0),
        ticks=[0.5] if least == most else [0, 1],
    )  # fmt: skip
    ends = [f"all {chart.format(most)}"] if least == most else map(chart.format, (least, most))
    bar.ax.set_xticklabels([*ends])
    bar.outline.set_visible(False)
    return [_Drawn(cells, "heat", tips)]


def _draw_bars(axes: Any, chart: BarChart) -> list[_Drawn]:
    """Draw bars from top to bottom, each with its label, its value, and a line to its extremes."""
    drawn = []
    for place, bar in enumerate(chart.bars):
        color = COLORS[0] if bar.ours else PLAIN_BAR
        [patch] = axes.barh(place + 0.2, bar.value, color=color, height=0.42)
        drawn.append(_Drawn(patch, "bar", [bar.describe()]))
        axes.text(0, place - 0.2, _shortened(bar.label, LABEL), va="center").set_in_layout(False)
        end = bar.value
        if bar.least is not None and bar.most is not None:
            axes.plot([bar.least, bar.most], [place + 0.2] * 2, color=INK, linewidth=1.4)
            end = max(end, bar.most)
        axes.annotate(
            _printable(bar.text), (end, place + 0.2), xytext=(5, 0), textcoords="offset points",
            va="center", color=SOFT,
        ).set_in_layout(False)  # fmt: skip
    axes.set_xlim(0, max(chart.longest, 1e-12) / 0.68)
    axes.set_ylim(len(chart.bars) - 0.5, -0.5)
    axes.set_axis_off()
    return drawn


def _printable(text: str) -> str:
    """A text without characters that no picture can show, and no XML."""
    return "".join(
        c if c.isprintable() or c == "\u00a0" else "\N{REPLACEMENT CHARACTER}" for c in text
    )


def _shortened(text: str, most: int) -> str:
    """A text without its middle, if it is long."""
    text, half = _printable(text), most // 2
    return text if len(text) <= most else f"{text[:half]}…{text[1 - half :]}"


# -- for the page --------------------------------------------------------------------------------


def _fit_to_page(root: ElementTree.Element) -> None:
    """Leave out name spaces, fonts, clipping and metadata, and make colours those of the page."""
    from matplotlib.colors import LinearSegmentedColormap, to_hex

    colors = LinearSegmentedColormap.from_list("heat", [COLDEST, HOTTEST], N=HEATS)
    variables = {
        to_hex(colors(level)): f"color-mix(in oklab, var(--heat-high) {100 * level / (HEATS - 1):g}"
        "%, var(--heat-low))"
        for level in range(HEATS)
    } | VARIABLES
    for element in root.iter():
        element.tag = element.tag.rpartition("}")[2]
        element.text, element.tail = (element.text or "").strip() or None, None
        style = element.attrib.pop("style", "")
        element.attrib = {
            name.rpartition("}")[2]: re.sub(r"\d+\.\d+", lambda x: f"{float(x[0]):.2f}", value)
            for name, value in element.items()
            if name != "clip-path" and not value.startswith("rotate(-0 ")
        }
        if style := "; ".join(x for x in style.split("; ") if not x.startswith("font")):
            element.set("style", re.sub("#[0-9a-f]{6}", lambda x: variables.get(x[0], x[0]), style))
    for parent in reversed([*root.iter()]):  # the inner elements first
        for child in [*parent]:
            empty = child.tag in ("g", "defs") and not len(child)
            if empty or child.tag in ("metadata", "style", "clipPath"):
                parent.remove(child)


def _add_tips(group: ElementTree.Element, tips: Sequence[str]) -> None:
    """Put each mark of a group into an element with its tip and some space for fingers."""
    parents = [(parent, child) for parent in group.iter() for child in parent]
    marks = [pair for pair in parents if pair[1].tag == "use"] or [
        pair for pair in parents if pair[1].tag == "path" and pair[0].tag != "defs"
    ]
    for (parent, mark), tip in zip(marks, tips, strict=False):
        own = ElementTree.Element("g", {"class": "mark"})
        ElementTree.SubElement(own, "title").text = _printable(tip)
        if mark.tag == "use":
            place = {"cx": mark.get("x", ""), "cy": mark.get("y", ""), "r": "12"}
            ElementTree.SubElement(own, "circle", {"class": "hit", **place})
        parent[[*parent].index(mark)] = own
        own.append(mark)
