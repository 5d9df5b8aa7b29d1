"""Presets on the bench of small models: none may lose to the published method that it improves.

    python -m benchmarks.models.small_models FOLDER --text c4.jsonl wiki.txt     (once)
    python -m benchmarks.quality.small_models FOLDER --text WikiText-2=wiki.valid.raw

Protocol: the three models of `models/small_models.py`; 64 windows of 256 tokens of FOLDER/calibration.jsonl
(`concatenate`, the seed's); loss on the first 64 windows of 256 tokens of FOLDER/judged.jsonl and
of each other text, none of which was trained on. Excess is nats above the dense model. ALPS
runs in the papers' order (`--sequential layer`), with the parameters of its paper.
Float32, one thread, no times.

Every finished row is kept in `results/bench-balanced.json` at once and skipped when it is there.

**The guard:** the script fails if `balanced` is worse than ALPS on any model, column and text, by
more than 0.002 nats, which is noise.
"""

from __future__ import annotations

import argparse
import math
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from benchmarks.hardware import add, heading, markdown
from benchmarks.stored import known_rows

import secateur

MEASURES = ("src/secateur/engine", "src/secateur/sparsity", "src/secateur/training/distillation.py")
MINUTES = 20

NAME = "bench-balanced"
MODELS = ("gemma", "qwen", "experts")
COLUMNS: dict[str, dict[str, Any]] = {
    "50 %": {"sparsity": 0.5},
    "2:4": {"pattern": "2:4"},
}
ROWS: dict[str, dict[str, Any]] = {
    "ALPS": {"method": "alps", "sequential": "layer"},
    "balanced": {"effort": "balanced"},
}
LENGTH, WINDOWS = 256, 64
NOISE = 0.002

Rows = list[dict[str, Any]]


def ours(row: dict[str, Any]) -> bool:
    """Whether our code has pruned the model of a row."""
    return bool(row["row"] != "dense")


def proof(row: dict[str, Any]) -> tuple[str, ...]:
    """The command lines that write weights as a row does."""
    own = {"ALPS": ("alps", "sequential"), "balanced": ("balanced",)}
    return tuple(f"llama/{case}" for case in own[row["row"]])


def judge(folder: Path, model: Path, texts: dict[str, str]) -> dict[str, float]:
    """Nats per token on each text."""
    files = {"held out": str(folder / "judged.jsonl"), **texts}
    judged = {}
    for name, file in files.items():
        found = secateur.evaluate(model, text=file, sequence_length=LENGTH, windows=WINDOWS)
        judged[name] = math.log(found.perplexity)
    return judged


def loss_of(
    folder: Path, model: str, row: str, column: str, seed: int, texts: dict[str, str]
) -> dict[str, float]:
    """Prune a model, and judge it."""
    if row == "dense":
        return judge(folder, folder / model, texts)
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "pruned"
        secateur.prune(
            folder / model,
            output=out,
            calibration=str(folder / "calibration.jsonl"),
            sequence_length=LENGTH,
            seed=seed,
            **{"windows": WINDOWS, **COLUMNS[column], **ROWS[row]},
        )
        found = judge(folder, out, texts)
        shutil.rmtree(out)
    return found


def excess(rows: Rows, model: str, row: str, column: str) -> dict[str, float]:
    """Nats above the dense model by text, the mean of all seeds; empty if it was not measured."""
    of_model = [x for x in rows if x["model"] == model]
    dense = next((x["loss"] for x in of_model if x["row"] == "dense"), {})
    found = [x["loss"] for x in of_model if (x["row"], x["column"]) == (row, column)]
    if not found or not dense:
        return {}
    return {text: sum(x[text] for x in found) / len(found) - dense[text] for text in dense}


def ratio(rows: Rows, model: str, column: str) -> float:
    """Excess of `balanced` as a fraction of that of ALPS, the mean of all texts."""
    own, rival = (excess(rows, model, x, column) for x in ("balanced", "ALPS"))
    return sum(own[text] / rival[text] for text in own) / len(own)


def families(rows: Rows) -> tuple[list[str], list[list[str]]]:
    """Excess loss on held-out text and WikiText-2, and as a share of that of ALPS."""
    lines = []
    for model in MODELS:
        for column in COLUMNS:
            cells = [
                ", ".join(f"{x:.3f}" for x in excess(rows, model, row, column).values())
                for row in ROWS
            ]
            lines.append([f"{model}, {column}", *cells, f"{ratio(rows, model, column):.2f}"])
    return ["", *ROWS, "balanced, of ALPS"], lines


TABLES = {"families": families}


def losers(rows: Rows) -> list[str]:
    """Where `balanced` is worse than ALPS."""
    found = []
    for model in MODELS:
        for column in COLUMNS:
            own, rival = (excess(rows, model, x, column) for x in ("balanced", "ALPS"))
            found += [
                f"{model}, {column}, {text}: balanced {own[text]:.3f}, ALPS {rival[text]:.3f}"
                for text in own.keys() & rival.keys()
                if own[text] > rival[text] + NOISE
            ]
    return found


def main() -> None:
    """Fill the table, as far as asked, and hold the guard."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="of models/small_models.py")
    parser.add_argument("--text", nargs="*", default=[], help="NAME=FILE, to judge as well")
    parser.add_argument("--models", nargs="*", default=[*MODELS], choices=MODELS)
    parser.add_argument("--columns", nargs="*", default=[*COLUMNS], choices=[*COLUMNS])
    parser.add_argument("--rows", nargs="*", default=[*ROWS], choices=[*ROWS])
    parser.add_argument("--seeds", nargs="*", type=int, default=[0])
    args = parser.parse_args()
    torch.set_num_threads(1)
    print(heading())
    texts = dict(text.split("=", 1) for text in args.text)
    protocol = {"windows": WINDOWS, "sequence_length": LENGTH, "loss": "nats per token"}
    cells = [(m, r, c) for m in args.models for c in args.columns for r in args.rows]
    wanted = [(m, "dense", "", 0) for m in args.models]
    wanted += [(*cell, seed) for seed in args.seeds for cell in cells]
    for model, row, column, seed in wanted:
        known = {(r["model"], r["row"], r["column"], r["seed"]) for r in known_rows(NAME)}
        if (model, row, column, seed) in known:
            continue
        loss = loss_of(args.folder, model, row, column, seed, texts)
        found = {"model": model, "row": row, "column": column, "seed": seed, "loss": loss}
        add(NAME, protocol, found)
        print(found, flush=True)
    rows = known_rows(NAME)
    print(markdown(*families(rows)))
    lost = losers(rows)
    if lost:
        sys.exit("balanced is worse than ALPS in the papers' order:\n" + "\n".join(lost))


if __name__ == "__main__":
    main()
