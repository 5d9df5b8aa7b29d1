"""Structured cuts of SmolLM2-135M, by kind and by how much of the decoder goes.

    python -m benchmarks.quality.structure --calibration c4.jsonl --text wiki.txt

Protocol: SmolLM2-135M, float32, 64 windows of 512 tokens (`random-crop`, seed 0) of the calibration
file; perplexity on the first 24 non-overlapping windows of 2048 tokens; excess = ln(perplexity) −
ln(dense perplexity). A level is the fraction of the parameters of the decoder layers that goes;
depth removes the nearest number of layers. The published codes are measured by
`structured_rivals.py`, on the same windows and judged tokens.

Every finished cell is kept in `results/structure.json` at once and skipped when it is there.
"""

from __future__ import annotations

import argparse
import math
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.hardware import add, heading, markdown
from benchmarks.stored import known_rows

import secateur

MEASURES = ("src/secateur/structured", "src/secateur/engine/search")
MINUTES = 360

MODEL, LAYERS, HIDDEN = "smollm2-135m", 30, 576
LEVELS = (0.1, 0.2, 0.3, 0.5)

Options = dict[str, Any]


def ours(row: dict[str, Any]) -> bool:
    """Whether our code has cut the model of a row."""
    return bool(row["row"] != "dense")


def proof(row: dict[str, Any]) -> list[str]:
    """The command lines that write weights as a row does."""
    kind = row["row"].partition(", ")[0]
    cut = {"depth": ["layers", "layers greedy"], "hidden": ["hidden"]}.get(kind, ["parameters"])
    return [f"llama/{case}" for case in (*cut, "osscar")]


def depth(by: str, **more: Any) -> Callable[[float], Options]:
    """Whole layers."""
    return lambda level: {"keep_layers": LAYERS - round(level * LAYERS), "depth_by": by, **more}


def width(**more: Any) -> Callable[[float], Options]:
    """Heads and neurons."""
    return lambda level: {"keep_parameters": round(1 - level, 6), **more}


FFN, WHOLE = 0.75, {"whole_first": 3, "whole_last": 1}
"""The neurons' share of a decoder layer, and the layers that LLM-Pruner keeps whole."""


def neurons(**more: Any) -> Callable[[float], Options]:
    """Neurons alone, of all layers; up to 30 % that is what `width` takes too."""
    return lambda level: {"ffn": round(1 - level / FFN, 6), **more}


def middle(**more: Any) -> Callable[[float], Options]:
    """Neurons of all layers but the first three and the last."""
    share = LAYERS / (LAYERS - sum(WHOLE.values())) / FFN
    return lambda level: {"ffn": round(1 - level * share, 6), **WHOLE, **more}


def mixed(**more: Any) -> Callable[[float], Options]:
    """A third of the level by depth, the rest by width."""
    return lambda level: {
        "keep_layers": LAYERS - round(level * LAYERS / 3),
        "keep_parameters": round(1 - level, 6),
        **more,
    }


def hidden(**more: Any) -> Callable[[float], Options]:
    """Channels of the residual stream, in multiples of the 9 heads."""
    return lambda level: {"hidden_size": 9 * round((1 - level) * HIDDEN / 9), **more}


ROWS: dict[str, Callable[[float], Options]] = {
    "depth, influence": depth("influence", effort="fast"),
    "depth, greedy": depth("greedy", effort="balanced", asymmetric=False),
    "depth, influence, refitted": depth("influence", effort="balanced"),
    "depth, greedy, refitted": depth("greedy", effort="balanced"),
    "hidden": hidden(effort="fast"),
    "hidden, refitted": hidden(effort="balanced"),
    "width, balanced": width(effort="balanced"),
    "neurons, balanced": neurons(effort="balanced"),
    "middle, balanced": middle(effort="balanced"),
    "mixed, balanced": mixed(effort="balanced"),
}


def measured(args: argparse.Namespace, row: str, level: float) -> dict[str, Any]:
    """One cell."""
    options = ROWS[row](level)
    options |= {"calibration": args.calibration, "windows": 64, "sequence_length": 512,
                "packing": "random-crop"}  # fmt: skip
    with tempfile.TemporaryDirectory() as scratch:
        report = secateur.structure(MODEL, output=Path(scratch) / "cut", **options)
        judged = secateur.evaluate(
            str(report.output), text=args.text, sequence_length=2048, windows=args.windows
        )
    record = report.manifest.structure
    return {
        "row": row,
        "level": level,
        "decoder_removed": record.decoder_removed,
        "varied": record.varied,
        "perplexity": judged.perplexity,
        "protocol_id": judged.protocol_id,
        "seconds": report.manifest.cost.seconds,
        "peak_resident_bytes": report.manifest.cost.peak_resident_bytes,
        "distillation": report.manifest.distillation,
    }


SHOWN = {
    "`--keep-parameters`, `balanced`": "width, balanced",
    "`--ffn … --whole-first 3 --whole-last 1`, `balanced`": "middle, balanced",
    "`--keep-layers`, `balanced`": "depth, influence, refitted",
    "a third by `--keep-layers`, the rest by `--keep-parameters`": "mixed, balanced",
    "`--hidden-size`, `balanced`": "hidden, refitted",
}
"""The rows of the page on cuts, by the options that make them."""


def excess(rows: list[dict[str, Any]], name: str, level: float) -> float | None:
    """The loss of a cut above the dense model, in nats for a token."""
    found = {(r["row"], r["level"]): math.log(r["perplexity"]) for r in rows}
    return found[name, level] - found["dense", 0.0] if (name, level) in found else None


def cuts(rows: list[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """The excess loss of each kind of cut, by the share of the decoder that went."""
    lines = [
        [shown, *("" if x is None else f"{x:.3f}" for x in (excess(rows, name, y) for y in LEVELS))]
        for shown, name in SHOWN.items()
    ]
    return ["decoder parameters removed", *(f"{level:.0%}" for level in LEVELS)], lines


def refits(rows: list[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """The excess loss of a cut, and of the same cut with a refit."""
    kinds = {"layers, by influence": "depth, influence", "layers, by greedy removal": "depth, greedy",
             "channels": "hidden"}  # fmt: skip
    lines = []
    for shown, name in kinds.items():
        both = [[excess(rows, x, y) for x in (name, f"{name}, refitted")] for y in LEVELS]
        pairs = ("" if one is None or other is None else f"{one:.3f} → {other:.3f}"
                 for one, other in both)  # fmt: skip
        lines.append([shown, *pairs])
    return ["decoder parameters removed", *(f"{level:.0%}" for level in LEVELS)], lines


def depths(rows: list[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """The excess loss of cuts of whole layers, by how the layers were chosen."""
    lines = []
    for name in ROWS:
        found = [excess(rows, name, level) for level in LEVELS]
        if name.startswith("depth, ") and any(found):
            cells = ["" if x is None else f"{x:.3f}" for x in found]
            lines.append([name.removeprefix("depth, "), *cells])
    return ["layers removed", *(f"{level:.0%}" for level in LEVELS)], lines


TABLES = {"cuts": cuts, "refits": refits, "depth": depths}


def main() -> None:
    """Fill the table, as far as asked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--calibration", default="boolq-calibration")
    parser.add_argument("--text", default="boolq-held-out")
    parser.add_argument("--windows", type=int, default=24)
    parser.add_argument("--rows", nargs="*", default=[*ROWS], choices=[*ROWS])
    parser.add_argument("--levels", nargs="*", type=float, default=LEVELS)
    args = parser.parse_args()
    print(heading())
    protocol = {"windows": args.windows, "sequence_length": 2048, "calibration": "64 x 512"}
    if not known_rows("structure"):
        judged = secateur.evaluate(
            MODEL, text=args.text, sequence_length=2048, windows=args.windows
        )
        row = {"row": "dense", "level": 0.0, "perplexity": judged.perplexity}
        add("structure", protocol, {**row, "protocol_id": judged.protocol_id})
    for level in args.levels:
        for row in args.rows:
            if any((r["row"], r["level"]) == (row, level) for r in known_rows("structure")):
                continue
            found = measured(args, row, level)
            add("structure", protocol, found)
            print(found, flush=True)
    print(markdown(*cuts(known_rows("structure"))))


if __name__ == "__main__":
    main()
