"""The README's picture, drawn from the results that `quality/gguf_types.py` kept.

    python -m benchmarks.picture            writes docs/pictures/measured.svg
    python -m benchmarks.picture --check    fails if that file differs from the results

Divergence on WikiText-2 against the bytes of GGUF files, all of one model (SmolLM2-135M in 768
channels), calibrated with one text and judged by one program. Files by auto-round are drawn once
`results/gguf-types.json` has them. It measures nothing.
"""

from __future__ import annotations

import argparse
import json
import sys
from io import StringIO
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt

HERE = Path(__file__).parent
PICTURE = HERE.parent / "docs" / "pictures" / "measured.svg"
MODEL = "smollm2-768"
OURS, OTHERS, THIRD, GRID = "#0f7a52", "#6b7280", "#b45309", "#e5e7eb"
PAGE, INK = "#ffffff", "#1f2937"
NIGHT = {PAGE: "#0d1117", INK: "#e2e4e9", OURS: "#2dae80", OTHERS: "#9aa3b2", THIRD: "#f59e0b",
         GRID: "#2f353f"}  # fmt: skip
"""The colours of a dark page."""
MAKERS = {
    "secateur": (OURS, "o-", ("secateur Q2_K", "fit 3.5 bits", "secateur Q3_K", "secateur IQ4_XS",
                              "secateur Q4_K")),
    "llama.cpp, one type": (OTHERS, "s-", ("llama.cpp pure Q2_K", "llama.cpp pure Q3_K",
                                           "llama.cpp pure IQ4_XS", "llama.cpp pure Q4_K")),
    "llama.cpp, its mixes": (OTHERS, "D", ("llama.cpp Q2_K", "llama.cpp Q3_K_M",
                                           "llama.cpp IQ4_XS", "llama.cpp Q4_K_M")),
    "auto-round": (THIRD, "^", tuple(f"auto-round {x}" for x in ("Q2_K_S", "Q3_K_S", "Q4_K_S",
                                                                 "Q4_K_M"))),
}  # fmt: skip
"""Colour, marks and files of each maker."""
UNNAMED = ("secateur Q3_K",)
"""Points beside another one."""


def points(files: tuple[str, ...]) -> list[tuple[float, float, str]]:
    """MiB, divergence and name of each file that was measured."""
    content = json.loads((HERE / "results" / "gguf-types.json").read_text(encoding="utf-8"))
    known: dict[str, dict[str, Any]] = {
        row["contender"]: row for row in content["rows"] if row["model"] == MODEL
    }
    return [
        (known[file]["file"] / 2**20, known[file]["wiki"]["divergence"], file)
        for file in files
        if file in known
    ]


def night() -> str:
    """The style of a dark page."""
    rules = (
        f' [style*="{part}: {light}"] {{ {part}: {dark} !important }}'
        for light, dark in NIGHT.items()
        for part in ("fill", "stroke")
    )
    return f"<style>@media (prefers-color-scheme: dark) {{{''.join(rules)} }}</style>"


def picture() -> str:
    """The picture as SVG; the same text for the same results."""
    words = ("text.color", "axes.labelcolor", "ytick.labelcolor", "xtick.labelcolor")
    plt.rcParams.update({"svg.hashsalt": "secateur", "font.size": 12, **dict.fromkeys(words, INK)})
    # as narrow as a phone, where wider pictures have letters too small to read
    figure, axes = plt.subplots(figsize=(6.2, 4.8), constrained_layout=True)
    for maker, (color, marks, files) in MAKERS.items():
        found = points(files)
        sizes, heights = [x for x, _, _ in found], [y for _, y, _ in found]
        if found:
            axes.plot(sizes, heights, marks, color=color, label=maker, markersize=7, linewidth=2.2)
        for size, height, file in found:
            label(axes, (size, height), file, color, above="-" not in marks)
    marked = (0.05, 0.1, 0.2, 0.5, 1, 1.5)
    axes.set_yscale("log")
    axes.set_yticks(marked, labels=[f"{x:g}" for x in marked])
    axes.set_yticks((), minor=True)
    axes.margins(x=0.12, y=0.1)
    axes.grid(axis="y", color=GRID)
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    title = "Divergence from the original model, nats: lower is better"
    axes.set_title(title, loc="left", fontsize=12.5)
    axes.set_xlabel("size of the file, MiB: further left is smaller", loc="left")
    axes.legend(frameon=False, loc="upper right")
    text = StringIO()
    figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None})
    return text.getvalue().replace(" <metadata>", f" {night()}\n <metadata>", 1)


def label(axes: Any, place: tuple[float, float], file: str, color: str, above: bool) -> None:
    """The name of a file beside its point: above, or below it."""
    if file in UNNAMED:
        return
    for maker in ("secateur ", "llama.cpp ", "pure ", "auto-round "):
        file = file.removeprefix(maker)
    side, ways = (6, ("left", "bottom")) if above else (-6, ("right", "top"))
    axes.annotate(file, place, (side, side), textcoords="offset points", color=color,
                  fontsize=10.5, ha=ways[0], va=ways[1])  # fmt: skip


def main() -> None:
    """Write the picture, or compare it."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--check", action="store_true")
    text = picture()
    if not parser.parse_args().check:
        PICTURE.parent.mkdir(exist_ok=True)
        PICTURE.write_text(text)
    elif PICTURE.read_text() != text:
        sys.exit(f"{PICTURE.name} differs from the results: run python -m benchmarks.picture")


if __name__ == "__main__":
    main()
