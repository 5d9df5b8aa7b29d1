"""Layout of line charts: the SVG coordinates that the template writes out."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from secateur.reporting.charts import LineChart, Mark

WIDTH, HEIGHT = 430.0, 310.0
LEFT, RIGHT, TOP, BOTTOM = 46.0, 14.0, 16.0, 40.0
MARK = 11.0
"""The width of a mark, with some space around it."""
LETTER, LINE = 6.6, 13.0
"""Width of a letter and height of a line of small print."""

Place = tuple[float, float]
Box = tuple[float, float, float, float]

SHAPES = (
    "M-4.4 0a4.4 4.4 0 1 0 8.8 0a4.4 4.4 0 1 0-8.8 0z",
    "M-4-4h8v8h-8z",
    "M0-5.2L5 3.8H-5z",
    "M0-5.6L5.6 0L0 5.6L-5.6 0z",
    "M0 5.2L5-3.8H-5z",
    "M-5-1.7h3.3V-5h3.4v3.3H5v3.4H1.7V5h-3.4V1.7H-5z",
)
"""SVG paths of the marks, centred on their point. They can be distinguished without colours."""


@dataclass(frozen=True)
class Tick:
    """A position on an axis, with its label."""

    at: float
    text: str


@dataclass(frozen=True)
class DrawnMark:
    """A mark, with the position of its label."""

    x: float
    y: float
    description: str
    label: str
    label_x: float
    label_y: float


@dataclass(frozen=True)
class DrawnSeries:
    """A series: its number decides colour, stroke and shape."""

    number: int
    name: str
    shape: str
    path: str
    marks: tuple[DrawnMark, ...]


@dataclass(frozen=True)
class Drawing:
    """A line chart with all coordinates."""

    chart: LineChart
    width: float
    height: float
    left: float
    right: float
    top: float
    bottom: float
    x_ticks: tuple[Tick, ...]
    y_ticks: tuple[Tick, ...]
    series: tuple[DrawnSeries, ...]
    reference_y: float | None


@dataclass(frozen=True)
class Axis:
    """Maps values to coordinates."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        """The coordinate of a value."""
        low, high = self.low, self.high
        if self.log:
            low, high, value = math.log(low), math.log(high), math.log(value)
        return round(self.start + (value - low) / (high - low) * (self.end - self.start), 1)


def draw(chart: LineChart) -> Drawing:
    """Compute the coordinates of everything in a chart."""
    marks = [mark for series in chart.series for mark in series.drawn]
    ys = [m.y for m in marks] + ([chart.reference[1]] if chart.reference else [])
    log = chart.log_y and min(ys) > 0
    x = Axis(*_span([m.x for m in marks], 0.08), LEFT, WIDTH - RIGHT)
    y = Axis(*_span(ys, 0.12, log=log), HEIGHT - BOTTOM, TOP, log)
    placed = _spread([[(x(m.x), y(m.y)) for m in one.drawn] for one in chart.series])
    taken = [(a - 5, b - 5, a + 5, b + 5) for places in placed for a, b in places]
    reference_y = y(chart.reference[1]) if chart.reference else None
    if reference_y is not None:  # the dashed line, and its name at the right end
        taken += [(LEFT, reference_y - 2, WIDTH - RIGHT, reference_y + 2)]
        taken += [(WIDTH - RIGHT - 13 * LETTER, reference_y - LINE, WIDTH - RIGHT, reference_y)]
    series = []
    for number, one in enumerate(chart.series):
        places = placed[number]
        path = "M" + "L".join(f"{a:g} {b:g}" for a, b in places) if one.joined else ""
        drawn = tuple(_place_mark(m, *p, taken) for m, p in zip(one.drawn, places, strict=True))
        series.append(
            DrawnSeries(number % len(SHAPES), one.name, SHAPES[number % len(SHAPES)], path, drawn)
        )
    return Drawing(
        chart,
        WIDTH,
        HEIGHT,
        LEFT,
        WIDTH - RIGHT,
        TOP,
        HEIGHT - BOTTOM,
        tuple(Tick(x(v), _tick_text(v, chart.percent_x)) for v in ticks(x.low, x.high, 6)),
        tuple(
            Tick(y(v), _tick_text(v))
            for v in (_log_ticks(y.low, y.high) if log else ticks(y.low, y.high, 5))
        ),
        tuple(series),
        reference_y,
    )


def _spread(series: Sequence[Sequence[Place]]) -> list[list[Place]]:
    """Positions of marks, moved sideways by a mark's width if an earlier series has a mark there.

    Only series with one mark move, because on a line the position shows the value.
    """
    placed: list[list[Place]] = []
    for places in series:
        own = [*places]
        if len(own) == 1:
            others = [place for earlier in placed for place in earlier]
            while any(math.dist(own[0], other) < MARK for other in others):
                own = [(own[0][0] + MARK, own[0][1])]
        placed.append(own)
    return placed


def _span(values: Sequence[float], margin: float, *, log: bool = False) -> tuple[float, float]:
    """The range from the smallest to the largest value, with some margin."""
    low, high = min(values), max(values)
    if log:
        room = max(math.log(high / low) * margin, 0.05)
        return low / math.exp(room), high * math.exp(room)
    room = (high - low) * margin or max(abs(high), 1e-9) * 0.1
    return low - room, high + room


def ticks(low: float, high: float, about: int) -> list[float]:
    """About `count` round numbers in a range."""
    raw = (high - low) / about
    scale = 10.0 ** math.floor(math.log10(raw))
    step = next(scale * factor for factor in (1, 2, 5, 10) if scale * factor >= raw)
    first = math.ceil(low / step)
    return [n * step for n in range(first, math.floor(high / step) + 1)]


def _log_ticks(low: float, high: float) -> list[float]:
    """Round numbers in a logarithmic range; more of them if the range is narrow."""
    factors = {True: (1, 1.5, 2, 3, 4, 5, 6, 8), False: (1, 2, 5)}[high / low < 8]
    if high / low > 2000:
        factors = (1,)
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    found = [f * 10.0**d for d in decades for f in factors if low <= f * 10.0**d <= high]
    return found if len(found) > 2 else ticks(low, high, 5)


def _tick_text(value: float, percent: bool = False) -> str:
    """The short label of a tick."""
    if percent:
        return f"{100 * value:.3g} %"
    return f"{value:,.0f}" if value >= 1000 else f"{value:.4g}"


def _place_mark(mark: Mark, x: float, y: float, taken: list[Box]) -> DrawnMark:
    """Place the label of a mark where it covers nothing else, above the mark if possible."""
    half = LETTER * len(mark.label) / 2
    inner = min(max(x, LEFT + half + 1), WIDTH - half - 1)  # a long label stays in the picture
    best, least = (inner, y - 9), math.inf
    sides = ((x + half + 7, y + 4), (x - half - 7, y + 4))
    for at_x, at_y in ((inner, y - 9), (inner, y + 17), *sides, (inner, y - 22), (inner, y + 30)):
        box = (at_x - half, at_y - LINE + 2, at_x + half, at_y + 2)
        inside = box[0] > LEFT and box[2] < WIDTH and box[1] > 0 and box[3] < HEIGHT - BOTTOM
        covered = sum(_overlap(box, other) for other in taken) + (0 if inside else 100)
        if covered < least:
            best, least = (at_x, at_y), covered
    taken.append((best[0] - half, best[1] - LINE + 2, best[0] + half, best[1] + 2))
    return DrawnMark(x, y, mark.description, mark.label, round(best[0], 1), round(best[1], 1))


def _overlap(one: Box, other: Box) -> float:
    """The area that two boxes share."""
    width = min(one[2], other[2]) - max(one[0], other[0])
    height = min(one[3], other[3]) - max(one[1], other[1])
    return width * height if width > 0 and height > 0 else 0.0
