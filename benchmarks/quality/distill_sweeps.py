"""Distillation with the whole model in memory against one layer, in sweeps: loss, peak memory.

    python -m benchmarks.quality.distill_sweeps --calibration c4.jsonl \\
        --text WikiText-2=wiki.txt C4=held-out.txt

Protocol: `best` at 50 % (`--sparsity`, or `--pattern`). The kept results are of `best` as it was
with a uniform allocation and without hidden states. The first row is not distilled; the others
are the same but for the distillation. All have the same windows: `--windows` of 512 tokens of the
calibration file (`random-crop`, seed 0) and as many that the dense model generated, once. Each row
is a process of its own with one thread, and its peak is that of its resident memory. The loss is
that of the first `--judged` windows of 1024 tokens of each text; excess is nats above the dense
model, and gain the part of the excess of the first row that is gone.

Every finished row is kept in `results/distill-sweeps.json` at once and skipped when it is there.
A row that was killed goes on where it stopped, if `--folder` is given.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.hardware import add, heading, markdown
from benchmarks.stored import known_rows

import secateur

MEASURES = ("src/secateur/training",)

NAME = "distill-sweeps"
PRUNE = """
import json, sys, torch, secateur
torch.set_num_threads(1)
model, output, options = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
report = secateur.prune(model, output=output, resume=True, **options)
print(json.dumps({k: report.to_json()[k] for k in ("cost", "plan", "distillation")}))
"""
FIRST = "not distilled"


def rows_of(sizes: list[int]) -> dict[str, dict[str, Any]]:
    """The rows, and what they add to the preset."""
    return {
        FIRST: {"distill_epochs": 0},
        "whole": {"distill_sweep_windows": 0},
        **{f"sweeps of {n}": {"distill_sweep_windows": n} for n in sizes},
    }


def judge(args: argparse.Namespace, model: str) -> dict[str, float]:
    """Nats per token on each text."""
    found = {}
    for name, file in (text.split("=", 1) for text in args.text):
        judged = secateur.evaluate(
            model, text=file, sequence_length=args.judged_length, windows=args.judged
        )
        found[name] = math.log(judged.perplexity)
    return found


def pruned(args: argparse.Namespace, folder: Path, row: str, own: dict[str, Any]) -> dict[str, Any]:
    """Prune in a process of its own; what it cost.

    The first row generates the windows, and the others read them from its folder.
    """
    windows = folder / FIRST.replace(" ", "-") / "secateur" / "windows.safetensors"
    text: dict[str, Any] = {"calibration": str(windows), "generated_windows": 0}
    if row == FIRST:
        text = {"calibration": args.calibration, "windows": args.windows, "packing": "random-crop",
                "sequence_length": args.length, "generated_windows": args.own_windows}  # fmt: skip
    pattern = {"pattern": args.pattern} if args.pattern else {"sparsity": args.sparsity}
    method: dict[str, Any] = {"method": args.method} if args.method else {}
    method |= {"distill_learning_rate": args.rate} if args.rate else {}
    options = {"effort": "best", **text, **pattern, **method, **own}
    out = folder / row.replace(" ", "-")
    output = subprocess.run(
        [sys.executable, "-c", PRUNE, args.model, str(out), json.dumps(options)],
        check=True, stdout=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
    ).stdout  # fmt: skip
    found: dict[str, Any] = json.loads(output.splitlines()[-1])
    return {
        "peak_resident_bytes": found["cost"]["peak_resident_bytes"],
        "planned_bytes": found["plan"]["distilling_bytes"],
        "seconds": found["cost"]["seconds"],
        "distillation": found["distillation"],
        "loss": judge(args, str(out)),
    }


def losses(rows: list[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Excess loss over the dense model, and in brackets the part that came back."""
    of = {row["row"]: row for row in rows}
    dense, first = of.pop("dense")["loss"], of[FIRST]["loss"]
    lines = []
    for name, row in of.items():
        excess = {text: loss - dense[text] for text, loss in row["loss"].items()}
        back = {text: 1 - above / (first[text] - dense[text]) for text, above in excess.items()}
        shown = (f"{excess[x]:.3f}" + (f" ({back[x]:.0%})" if back[x] else "") for x in excess)
        lines.append([name, *shown])
    return ["", *dense], lines


def memory(rows: list[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """The peak of the process, and what was planned for the distillation."""
    lines = [
        [
            row["row"],
            *(f"{row[x] / 2**20:.0f} MiB" for x in ("peak_resident_bytes", "planned_bytes")),
        ]
        for row in rows
        if row["row"] != "dense"
    ]
    return ["", "peak of the process", "planned for the distillation"], lines


TABLES = {"losses": losses, "memory": memory}


def main() -> None:
    """Fill the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--calibration", default="boolq-calibration")
    parser.add_argument("--text", nargs="+", default=["boolq=boolq-held-out"])
    parser.add_argument("--windows", type=int, default=48)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--judged", type=int, default=16)
    parser.add_argument("--judged-length", type=int, default=1024)
    parser.add_argument("--sparsity", type=float, default=0.5)
    parser.add_argument("--pattern")
    parser.add_argument("--method", help="in place of the preset's, for a quick look at the memory")
    parser.add_argument("--rate", type=float, help="highest learning rate; else the preset's")
    parser.add_argument("--own-windows", type=int, help="that the model generates; as --windows")
    parser.add_argument("--sizes", type=int, nargs="*", default=[16], help="windows in a sweep")
    parser.add_argument("--folder", type=Path, help="an existing folder that keeps the models")
    parser.add_argument("--name", default=NAME, help="of the file of results")
    args = parser.parse_args()
    if args.own_windows is None:
        args.own_windows = args.windows
    print(heading())
    protocol = {k: v for k, v in vars(args).items() if k in ("windows", "length", "judged")}
    protocol |= {"judged_length": args.judged_length, "of": args.pattern or args.sparsity}
    protocol |= {"own_windows": args.own_windows, "method": args.method, "rate": args.rate}
    if not known_rows(args.name):
        add(args.name, protocol, {"row": "dense", "loss": judge(args, args.model)})
    with tempfile.TemporaryDirectory() as scratch:
        folder = args.folder or Path(scratch)
        for row, own in rows_of(args.sizes).items():
            known = any(x["row"] == row for x in known_rows(args.name))
            made = folder / FIRST.replace(" ", "-")
            if known and (row != FIRST or made.exists()):
                continue
            found = {"row": row, **pruned(args, folder, row, own)}
            if not known:
                add(args.name, protocol, found)
            print(found, flush=True)
    for shown in TABLES.values():
        print(markdown(*shown(known_rows(args.name))))


if __name__ == "__main__":
    main()
