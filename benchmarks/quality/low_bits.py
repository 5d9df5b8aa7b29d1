"""Fewer bits with the zeros kept: pruning and rounding solved together, or one after the other.

    python -m benchmarks.quality.low_bits --calibration c4.jsonl --text wiki.txt

SmolLM2-135M, whose source is a 4-bit file (Q4_1) with another grid. ALPS with 15 iterations and
asymmetric fitting prunes the linear layers to 50 % or 2:4, with 20 windows of 512 tokens. Norms,
embedding and head stay. The first 16 windows of 512 tokens of the text judge.

* `pruned`: not rounded.
* `then`: the pruned model, rounded with 16 windows to int4 in groups of 64, as `secateur compress`.
* `joint`: pruned and rounded in one solution, from the dense model.

Loss in nats above the dense model's. Every finished row is kept in `results/low-bits.json` at once,
and skipped when it is there. No times: other work may run on the machine.
"""

from __future__ import annotations

import argparse
import math
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.hardware import add, heading
from benchmarks.stored import known_rows

import secateur

MEASURES = ("src/secateur/quantization", "src/secateur/sparsity/solvers")
MINUTES = 20

MODEL = "smollm2-135m"
COLUMNS: dict[str, dict[str, Any]] = {"50 %": {"sparsity": 0.5}, "2:4": {"pattern": "2:4"}}
ROWS = {
    "pruned": "pruned, not rounded",
    "then": "then rounded with text",
    "joint": "pruned and rounded together",
}
SEARCH, BITS = {"iterations": 15, "growth": 1.6}, {"bits": 4, "group": 64}
HELD = {"score": "kept", "solver": "obs", "method_parameters": BITS}
ROUNDED = {"50 %": {**HELD, "scope": "layer"}, "2:4": HELD}
"""What rounds a pruned model and holds its mask."""


def made(row: str, column: str, calibration: Path, scratch: Path) -> Path:
    """The model of a cell; what is there already is not made again."""
    output = scratch / f"{row}-{column}".replace(" ", "").replace(":", "-").replace("%", "")
    if output.exists():
        return output
    model: str | Path = MODEL
    options: dict[str, Any] = {"windows": 20, "method": "alps", **COLUMNS[column]}
    options["method_parameters"] = {**SEARCH, **(BITS if row == "joint" else {})}
    if row == "then":
        model = made("pruned", column, calibration, scratch)
        options = {"windows": 16, **COLUMNS[column], **ROUNDED[column]}
    secateur.prune(
        model, output=output, calibration=calibration, sequence_length=512, asymmetric=True,
        fast_matmuls=True, **options,
    )  # fmt: skip
    return output


def loss(model: Path | str, text: Path) -> float:
    """Nats per token on the text."""
    return math.log(secateur.evaluate(model, text=text, sequence_length=512, windows=16).perplexity)


def together(rows: list[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Nats above the dense model: pruned, then rounded, or both in one solution."""
    of = {(row["row"], row["column"]): row["loss"] for row in rows}
    columns = [column for column in COLUMNS if all((row, column) in of for row in ROWS)]
    lines = [
        [shown, *(f"{of[row, column] - of['dense', '']:.3f}" for column in columns)]
        for row, shown in ROWS.items()
    ]
    return ["int4 in groups of 64", *columns], lines


TABLES = {"together": together}


def main() -> None:
    """Fill the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--calibration", type=Path, required=True)
    parser.add_argument("--text", type=Path, required=True)
    args = parser.parse_args()
    print(heading())
    protocol = {"judged": "16 x 512 tokens", "loss": "nats per token"}
    with tempfile.TemporaryDirectory() as scratch:
        for row, column in (("dense", ""), *((r, c) for c in COLUMNS for r in ROWS)):
            if (row, column) in {(r["row"], r["column"]) for r in known_rows("low-bits")}:
                continue
            dense = row == "dense"
            model = MODEL if dense else made(row, column, args.calibration, Path(scratch))
            found = {"row": row, "column": column, "loss": loss(model, args.text)}
            add("low-bits", protocol, found)
            print(found, flush=True)


if __name__ == "__main__":
    main()
