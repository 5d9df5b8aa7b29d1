"""Draw the pictures of docs/what-is-pruning.md and docs/methods/presets.md.

    python tools/explaining_pictures.py          # write them
    python tools/explaining_pictures.py --check  # fail if one is out of date

Masks are drawn from random weights by the definitions of the patterns. Perplexities are the rows of
`benchmarks/results/presets.json`.
"""

from __future__ import annotations

import json
import math
import random
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path

from written_files import write_or_check

ROOT = Path(__file__).resolve().parents[1]
PATTERNS, SPARSITY = Path("docs/pictures/patterns.svg"), Path("docs/pictures/sparsity.svg")
CURVE = Path("docs/pictures/curve.svg")
RESULTS = Path("benchmarks/results/presets.json")
SHOWN = ("fast", "balanced", "thorough", "best")
ROWS, COLUMNS, CELL = 8, 16, 11
KEPT, GONE, INK = "#0d9488", "#e5e7eb", "#1f2937"
LINES = (("wanda", "Wanda", "#9ca3af"), ("sparsegpt", "SparseGPT", "#6b7280"),
         ("alps", "ALPS", "#374151"),
         ("balanced", "balanced", "#0f766e"))  # fmt: skip

DARK = "".join([
    "<style>@media (prefers-color-scheme: dark) {",
    *(f' [{part}="{light}"] {{ {part}: {dark} }}' for light, dark in (
        ("white", "#1e2129"), (GONE, "#3f4654"), (INK, "#e2e4e9"),
        ("#374151", "#cbd0d8"), ("#6b7280", "#9aa3b2"), ("#0f766e", "#2dd4bf"),
    ) for part in ("fill", "stroke")),
    " }</style>",
])  # fmt: skip
"""The colours of a dark page; in a style sheet they come before the attributes."""

Mask = list[list[bool]]


def main() -> None:
    """Write the pictures, or check them."""
    write_or_check(
        ROOT, {PATTERNS: patterns(), SPARSITY: sparsity(), CURVE: curve()}, "explaining_pictures.py"
    )


def masks() -> dict[str, Mask]:
    """Half of a small random matrix kept, by pattern."""
    draw = random.Random(5)
    sizes = [[abs(draw.gauss(0, 1)) for _ in range(COLUMNS)] for _ in range(ROWS)]

    def half(units: Sequence[Sequence[tuple[int, int]]]) -> set[tuple[int, int]]:
        order = sorted(units, key=lambda unit: -sum(sizes[r][c] ** 2 for r, c in unit))
        return {place for unit in order[: len(order) // 2] for place in unit}

    rows, columns = range(ROWS), range(COLUMNS)
    kept = {
        "anywhere": {p for r in rows for p in half([[(r, c)] for c in columns])},
        "2:4": {
            p
            for r in rows
            for start in range(0, COLUMNS, 4)
            for p in half([[(r, c)] for c in range(start, start + 4)])
        },
        "blocks": half([
            [(r + i, c + j) for i in range(4) for j in range(4)]
            for r in range(0, ROWS, 4) for c in range(0, COLUMNS, 4)
        ]),
        "columns": half([[(r, c) for r in rows] for c in columns]),
    }  # fmt: skip
    return {
        name: [[(r, c) in places for c in columns] for r in rows] for name, places in kept.items()
    }


def patterns() -> str:
    """One small matrix for each pattern."""
    wide, gap = COLUMNS * CELL, 24
    parts: list[str] = []
    for number, (name, mask) in enumerate(masks().items()):
        left = 10 + number * (wide + gap)
        parts.append(text(left + wide / 2, 20, name, "middle"))
        for r, line in enumerate(mask):
            for c, kept in enumerate(line):
                color = KEPT if kept else GONE
                x, y = left + c * CELL, 30 + r * CELL
                parts.append(f'<rect x="{x}" y="{y}" width="9" height="9" fill="{color}"/>')
    return svg(20 + 4 * wide + 3 * gap, 40 + ROWS * CELL, "Kept weights by pattern", parts)


def sparsity() -> str:
    """Perplexity by sparsity, one line for each method; logarithmic upwards."""
    rows = json.loads((ROOT / RESULTS).read_text(encoding="utf-8"))["rows"]

    def mean(row: str, column: str) -> float:
        found = [r for r in rows if (r["row"], r["column"]) == (row, column)]
        return statistics.mean(r["perplexity"]["wikitext2"] for r in found)

    dense = mean("dense", "")
    low, high = math.log(18), math.log(2000)

    def place(share: float, perplexity: float) -> tuple[float, float]:
        up = (math.log(perplexity) - low) / (high - low)
        return 70 + share * 560, 290 - up * 260

    parts = []
    for tick in (20, 50, 100, 200, 500, 1000):
        x, y = place(0, tick)
        parts.append(f'<line x1="{x}" y1="{y:.1f}" x2="462" y2="{y:.1f}" stroke="{GONE}"/>')
        parts.append(text(62, y + 4, f"{tick}", "end"))
    for share in (0, 0.5, 0.6, 0.7):
        parts.append(text(place(share, 20)[0], 312, f"{share:.0%}", "middle"))
    ends: list[tuple[float, str, str]] = []
    for row, name, color in LINES:
        points = [place(0, dense), *(place(s, mean(row, f"{s:.0%}".replace("%", " %")))
                                     for s in (0.5, 0.6, 0.7))]  # fmt: skip
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        parts.append(f'<polyline points="{path}" fill="none" stroke="{color}" stroke-width="2.5"/>')
        ends.append((points[-1][1], name, color))
    parts += [text(472, y + 4, name, "start", color) for y, name, color in ends]
    parts.append(text(70, 20, "perplexity on WikiText-2, SmolLM2-135M (less is better)", "start"))
    parts.append(text(266, 332, "zeros; measured at 0, 50, 60 and 70 %", "middle"))
    return svg(600, 345, "Perplexity by sparsity and method", parts)


def curve() -> str:
    """Excess loss by time at 50 %, one line for each text; time is logarithmic."""
    rows = json.loads((ROOT / RESULTS).read_text(encoding="utf-8"))["rows"]
    (dense,) = (row for row in rows if row["row"] == "dense")
    presets = sorted(
        (row for row in rows if row["row"] in SHOWN and row["column"] == "50 %"),
        key=lambda row: row["core_minutes"],
    )

    def place(minutes: float, excess: float) -> tuple[float, float]:
        return 70 + 480 * math.log(minutes, 60), 290 - excess / 0.9 * 260

    parts = []
    for tick in (0, 0.2, 0.4, 0.6, 0.8):
        x, y = place(1, tick)
        parts.append(f'<line x1="{x}" y1="{y:.1f}" x2="550" y2="{y:.1f}" stroke="{GONE}"/>')
        parts.append(text(62, y + 4, f"{tick}", "end"))
    for minutes in (2, 5, 10, 20, 40):
        parts.append(text(place(minutes, 0)[0], 312, f"{minutes}", "middle"))
    for name, label, color in (("wikitext2", "WikiText-2", "#0f766e"), ("c4", "C4", "#9ca3af")):
        base = dense["perplexity"][name]
        points = [place(r["core_minutes"], math.log(r["perplexity"][name] / base)) for r in presets]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        parts.append(f'<polyline points="{path}" fill="none" stroke="{color}" stroke-width="2.5"/>')
        parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="{color}"/>' for x, y in points]
        parts.append(text(points[-1][0] + 8, points[-1][1] + 4, label, "start", color))
        if name == "wikitext2":
            named = zip(points, presets, strict=True)
            parts += [text(x, y - 10, row["row"], "middle") for (x, y), row in named]
    parts.append(
        text(70, 20, "nats above the dense SmolLM2-135M at 50 % (less is better)", "start")
    )
    parts.append(text(310, 332, "minutes of one core of a CPU", "middle"))
    return svg(640, 345, "Loss by time of the presets", parts)


def text(x: float, y: float, words: str, anchor: str, color: str = INK) -> str:
    """A line of text."""
    return f'<text x="{x:g}" y="{y:.1f}" text-anchor="{anchor}" fill="{color}">{words}</text>'


def svg(width: float, height: float, title: str, parts: Iterable[str]) -> str:
    """A picture that is light or dark as the reader's system is."""
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} {height:g}" '
        f'width="{width:g}" font-family="sans-serif" font-size="13" role="img">'
    )
    ground = f'<rect width="{width:g}" height="{height:g}" fill="white"/>'
    return "\n".join([head, f"<title>{title}</title>", DARK, ground, *parts, "</svg>"]) + "\n"


if __name__ == "__main__":
    main()
