"""Draw charts into PNG and SVG files with matplotlib, for papers and slides."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from secateur.reporting.charts import BarChart, Chart, HeatMap, LineChart
from secateur.reporting.drawing import HEIGHT, WIDTH, draw

COLORS = ("#0f7a52", "#c2502f", "#3b5ba5", "#8a4f9e", "#a87400", "#4d5a5f")
"""Colours that people with red-green blindness can distinguish. Shapes and strokes differ too."""

SHAPES = ("o", "s", "^", "D", "v", "P")
STROKES = ("-", (0, (6, 2)), (0, (1.5, 1.5)), (0, (6, 2, 1.5, 2)), (0, (3, 1)), (0, (8, 3)))
GREY = "#6b6b63"


def save_plots(charts: Sequence[Chart], stem: Path) -> list[Path]:
    """Draw charts side by side into STEM.png and STEM.svg.

    Args:
        charts: at least one chart.
        stem: path of the files, without their ending.

    Returns:
        The written files.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure  # pyplot would need a display and global state

    widths = [10.0 if isinstance(chart, HeatMap) else WIDTH / 68 for chart in charts]
    style: Any = {"font.size": 10, "svg.hashsalt": "secateur", "text.parse_math": False}
    with rc_context(style):
        figure = Figure(figsize=(sum(widths), _height_of(charts)), layout="constrained")
        panels = figure.subplots(1, len(charts), squeeze=False, width_ratios=widths)[0]
        for axes, chart in zip(panels, charts, strict=True):
            axes.set_title(chart.title, loc="left", fontweight="bold")
            if isinstance(chart, LineChart):
                _draw_lines(axes, chart)
            elif isinstance(chart, HeatMap):
                _draw_heat(figure, axes, chart)
            else:
                _draw_bars(axes, chart)
        files = [stem.with_name(f"{stem.name}.{kind}") for kind in ("png", "svg")]
        figure.savefig(files[0], dpi=160, metadata={"Software": None})
        figure.savefig(files[1], metadata={"Date": None})
    return files


def _height_of(charts: Sequence[Chart]) -> float:
    """Height of the tallest chart, in inches."""
    rows = [
        0.32 * len(c.rows) + 1.2 if isinstance(c, HeatMap) else 0.42 * len(c.bars) + 1.1
        for c in charts
        if not isinstance(c, LineChart)
    ]
    lines = [HEIGHT / 68 for c in charts if isinstance(c, LineChart)]
    return max(*rows, *lines, 2.0)


def _draw_lines(axes: Any, chart: LineChart) -> None:
    """Draw one line per series with labelled points, and the reference as a dashed line."""
    from matplotlib.patheffects import withStroke
    from matplotlib.ticker import FuncFormatter, NullFormatter, PercentFormatter

    drawing = draw(chart)
    for number, series in enumerate(chart.series):
        marks = series.drawn
        axes.plot(
            [m.x for m in marks],
            [m.y for m in marks],
            color=COLORS[number % len(COLORS)],
            marker=SHAPES[number % len(SHAPES)],
            linestyle=STROKES[number % len(STROKES)] if series.joined else "none",
            linewidth=1.8,
            markersize=6,
            label=series.name,
        )
        for mark, placed in zip(marks, drawing.series[number].marks, strict=True):
            axes.annotate(
                mark.label,
                (mark.x, mark.y),
                xytext=(placed.label_x - placed.x, placed.y - placed.label_y),
                textcoords="offset points",  # a unit of the drawing is about one point
                ha="center",
                fontsize=8.5,
                color=COLORS[number % len(COLORS)],
                path_effects=[withStroke(linewidth=2.5, foreground="white")],
            )
    if chart.reference:
        name, value = chart.reference
        axes.axhline(
            value, color=GREY, linestyle=(0, (4, 3)), linewidth=1.2, label=f"{name} {value:.4g}"
        )
    if chart.log_y:
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        low, high = axes.get_ylim()
        if high / low < 20:  # a short range needs the minor ticks
            axes.yaxis.set_minor_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            axes.tick_params(axis="y", which="minor", labelsize=8)
        else:
            axes.yaxis.set_minor_formatter(NullFormatter())
    if chart.percent_x:
        axes.xaxis.set_major_formatter(PercentFormatter(1, decimals=0, symbol=" %"))
    axes.margins(x=0.08, y=0.12)
    axes.set_xlabel(chart.x_label)
    axes.set_ylabel(chart.y_label)
    axes.grid(visible=True, which="major", color="#dddddd", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="upper left")


def _draw_heat(figure: Any, axes: Any, chart: HeatMap) -> None:
    """Draw one cell for each row and column, hatched if it has no value."""
    from matplotlib.colors import LogNorm, Normalize

    least, most = chart.span
    if most <= least:
        least, most = (least / 2, least * 2) if chart.log else (least - 0.01, most + 0.01)
    logarithmic = chart.log and least > 0
    norm = LogNorm(least, most) if logarithmic else Normalize(least, most)
    lowest = least if logarithmic else float("nan")
    cells = [[float("nan") if v is None else max(v, lowest) for v in row] for row in chart.values]
    axes.set_facecolor("#eeeeee")
    image = axes.imshow(cells, aspect="auto", cmap="YlGn", norm=norm, interpolation="nearest")
    axes.set_yticks(range(len(chart.rows)), chart.rows)
    step = max(1, len(chart.columns) // 15)
    axes.set_xticks(range(0, len(chart.columns), step), chart.columns[::step])
    axes.set_xlabel("layer")
    figure.colorbar(image, ax=axes, shrink=0.9, format="{x:.1%}" if chart.percent else None)


def _draw_bars(axes: Any, chart: BarChart) -> None:
    """Draw bars from top to bottom, each with its value and a line from least to most."""
    places = range(len(chart.bars))
    values = [bar.value for bar in chart.bars]
    colors = [COLORS[0] if bar.ours else "#b9b9ae" for bar in chart.bars]
    axes.barh(places, values, color=colors, height=0.62)
    for place, bar in zip(places, chart.bars, strict=True):
        end = bar.value
        if bar.least is not None and bar.most is not None:
            axes.plot([bar.least, bar.most], [place, place], color="#222222", linewidth=1.2)
            end = max(end, bar.most)
        axes.annotate(
            bar.text, (end, place), xytext=(5, 0), textcoords="offset points", va="center",
            fontsize=9,
        )  # fmt: skip
    axes.set_yticks(places, [bar.label for bar in chart.bars])
    axes.invert_yaxis()
    axes.set_xlim(0, 1.25 * max([*values, 1e-12]))
    axes.set_xlabel(chart.unit)
    axes.spines[["top", "right"]].set_visible(False)
