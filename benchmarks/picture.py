"""The README's picture, drawn from the results that other benchmarks kept.

    python -m benchmarks.picture            writes docs/pictures/measured.svg
    python -m benchmarks.picture --check    fails if that file differs from the results

Both parts show SmolLM2-135M. Above: excess loss on WikiText-2 at 50 % zeros before quantization:
published methods as means of all seeds, the presets with one, in `results/presets.json`. Below: tokens per second of stored models in
`results/first-page.json`. It measures nothing.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from io import StringIO
from pathlib import Path
from statistics import mean
from typing import Any

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt

HERE = Path(__file__).parent
PICTURE = HERE.parent / "docs" / "pictures" / "measured.svg"
OURS, OTHERS, PAGE, INK = "#0f7a52", "#9aa5aa", "#ffffff", "#1f2937"
DARK = (
    "<style>@media (prefers-color-scheme: dark) {"
    f' [style*="fill: {PAGE}"] {{ fill: #1e2129 !important }}'
    f' [style*="fill: {INK}"] {{ fill: #e2e4e9 !important }}'
    f' [style*="fill: {OURS}"] {{ fill: #2dae80 !important }}'
    " }</style>"
)
"""The colours of a dark page."""
METHODS = {
    "wanda": "Wanda",
    "sparsegpt": "SparseGPT",
    "alps": "ALPS",
    "fast": "secateur fast",
    "balanced": "secateur balanced",
    "thorough": "secateur thorough",
    "best": "secateur best",
}
"""The bars of the upper part, by row."""
ENGINES = {
    "no zeros, bfloat16, torch": "torch bfloat16",
    "llama.cpp Q8_0": "llama.cpp Q8_0",
    "llama.cpp Q4_0": "llama.cpp Q4_0",
    "no zeros, int8": "secateur int8",
    "balanced, int8": "secateur int8, 50 % zeros",
    "no zeros, int4": "secateur int4",
    "balanced, int4": "secateur int4, 50 % zeros",
}


def rows(name: str) -> list[dict[str, Any]]:
    """The rows of a benchmark."""
    found: list[dict[str, Any]] = json.loads((HERE / "results" / f"{name}.json").read_text())[
        "rows"
    ]
    return found


def excess() -> dict[str, float]:
    """Excess loss of each method at 50 %, nats per token."""

    measured = rows("presets")

    def loss(row: str, column: str) -> float:
        wanted = (r for r in measured if (r["row"], r["column"]) == (row, column))
        return mean(math.log(r["perplexity"]["wikitext2"]) for r in wanted)

    dense = loss("dense", "")
    return {label: loss(row, "50 %") - dense for row, label in METHODS.items()}


def speed() -> dict[str, float]:
    """Tokens per second of each engine and kind of weights."""
    by = {r["row"]: r.get("tokens_per_second") for r in rows("first-page")}
    return {label: by[name] for name, label in ENGINES.items()}


def bars(axes: Any, values: dict[str, float], form: str, title: str, below: str) -> None:
    """Horizontal bars with their numbers; below them what was measured on what."""
    labels = list(values)
    colors = [OURS if "secateur" in label else OTHERS for label in labels]
    drawn = axes.barh(labels, list(values.values()), color=colors)
    axes.bar_label(drawn, labels=[form.format(v) for v in values.values()], padding=3)
    axes.invert_yaxis()
    axes.set_title(title, loc="left", fontsize=11)
    axes.set_xlim(0, 1.18 * max(values.values()))
    axes.spines[["top", "right", "bottom"]].set_visible(False)
    axes.tick_params(left=False, bottom=False, labelbottom=False)
    axes.set_xlabel(below, loc="left", fontsize=9)


def picture() -> str:
    """The picture as SVG; the same text for the same results."""
    colors = dict.fromkeys(("text.color", "axes.labelcolor", "ytick.labelcolor"), INK)
    plt.rcParams.update(
        {"svg.hashsalt": "secateur", "font.size": 11, "axes.edgecolor": OTHERS, **colors}
    )
    # as narrow as a phone, where wider pictures have letters too small to read
    figure, (upper, lower) = plt.subplots(2, 1, figsize=(5.8, 5.8), layout="constrained")
    title = "Loss added by 50 % zeros (lower is better)"
    bars(upper, excess(), "{:.2f}", title, "SmolLM2-135M, WikiText-2, nats per token")
    title = "Tokens per second (higher is better)"
    bars(lower, speed(), "{:.0f}", title, "SmolLM2-135M, one text at a time, two CPU cores")
    text = StringIO()
    figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None})
    return text.getvalue().replace(" <metadata>", f" {DARK}\n <metadata>", 1)


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
