"""The presets against the published code of Wanda, SparseGPT and ALPS, and what each part brings.

    python -m benchmarks.quality.presets --calibration c4.jsonl --text wikitext=wiki.txt c4=held-out.txt \\
        --rivals-python OTHER/bin/python --wanda CHECKOUT --alps CHECKOUT

Protocol: SmolLM2-135M, float32, 64 windows of 512 tokens (`random-crop`, the seed's) of the
calibration file (the first 700 of 1,000 documents of C4; the last 100 judge); perplexity on
non-overlapping windows of 2048 tokens, loss over each window's own next tokens; excess =
ln(perplexity) − ln(dense perplexity). The rivals get the same windows and are run by `rivals.py` in
an environment of their own; all results are judged by the same evaluation. Seconds of ours are
those of the whole run, with reading, copying and verifying; those of the published code are the
pruning loop alone, with model and windows loaded before. Runs have one thread on a core of their
own (`taskset`); other work may run on the other one. Core minutes count the threads.

Every finished run is kept in `results/presets.json` at once, with its day and machine, and skipped
when it is there: the table can be made in several sittings, and by several processes. `--only` names
rows, `--columns` columns, `--seeds` seeds.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import statistics
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import torch
from benchmarks.hardware import add, heading
from benchmarks.stored import Rows, known_rows

import secateur
from secateur.calibration.documents import read_documents
from secateur.calibration.windows import (
    WindowPlan,
    make_windows,
    save_windows,
)
from secateur.models.sources import resolve
from secateur.models.tokenizer import load_tokenizer, start_tokens
from secateur.recipes.prune import presets
from secateur.recipes.reading import filled_in

MEASURES = ("src/secateur/engine", "src/secateur/sparsity")
MINUTES = 600

COLUMNS = {"30 %": (0.3, ""), "50 %": (0.5, ""), "60 %": (0.6, ""), "70 %": (0.7, ""),
           "2:4": (0.5, "2:4"), "4:8": (0.5, "4:8")}  # fmt: skip
RIVALS = ("wanda", "sparsegpt", "alps")
OURS: dict[str, dict[str, Any]] = {
    "fast": {"effort": "fast"},
    "balanced": {"effort": "balanced"},
    "thorough": {"effort": "thorough"},
    "best": {"effort": "best"},
    "our ALPS, papers' order": {"method": "alps", "sequential": "layer"},
    "our ALPS": {"method": "alps"},
    "SparseGPT + tuning": {"method": "sparsegpt", "tune_passes": 3},
    "SparseGPT + OWL": {"method": "sparsegpt", "allocation": "owl"},
    "SparseGPT + layer sensitivity": {"method": "sparsegpt", "allocation": "layer-sensitivity"},
    "SparseGPT + search": {"method": "sparsegpt", "allocation": "search"},
    "Wanda + swaps": {"method": "wanda", "refine": "swaps"},
    "Wanda + swaps + ADMM": {"score": "wanda", "solver": "admm", "refine": "swaps"},
}
WRITE = {
    "fast": ("fast",), "balanced": ("balanced",),
    "our ALPS": ("alps",), "our ALPS, papers' order": ("alps", "sequential"),
    "SparseGPT + tuning": ("sparsegpt", "tuned"), "SparseGPT + OWL": ("sparsegpt", "owl"),
    "SparseGPT + layer sensitivity": ("layer sensitivity",),
    "SparseGPT + search": ("sparsegpt", "search"), "Wanda + swaps": ("swaps",),
    "Wanda + swaps + ADMM": ("swaps", "admm"),
}  # fmt: skip
"""What writes weights as a row does, in `same_bytes.yaml`; without these, the presets do."""
PUBLISHED = {
    "wanda": "Wanda, published code",
    "sparsegpt": "SparseGPT, published code",
    "alps": "ALPS, published code",
}
TEXTS = {"wikitext2": "WikiText-2", "c4": "C4"}


def ours(row: dict[str, Any]) -> bool:
    """Whether our code has pruned the model of a row."""
    return row["row"] in OURS


def proof(row: dict[str, Any]) -> list[str]:
    """The command lines that write weights as a row does."""
    return [f"llama/{case}" for case in WRITE.get(row["row"], ("balanced", "best"))]


def runs_of(rows: Rows, row: str, column: str) -> Rows:
    """A row of all seeds."""
    return [r for r in rows if (r["row"], r["column"]) == (row, column)]


def excess(rows: Rows, row: str, column: str, text: str) -> list[float]:
    """Nats above the dense model, by seed."""
    (dense,) = runs_of(rows, "dense", "")
    base = dense["perplexity"][text]
    return [math.log(r["perplexity"][text] / base) for r in runs_of(rows, row, column)]


def judged(rows: Rows, row: str, column: str) -> list[str]:
    """For each text the perplexity of the mean loss, and in brackets the excess loss."""
    (dense,) = runs_of(rows, "dense", "")
    cells = []
    for text in TEXTS:
        found = excess(rows, row, column, text)
        middle = statistics.mean(found)
        perplexity = dense["perplexity"][text] * math.exp(middle)
        cells.append(f"{perplexity:.2f} ({middle:.3f})")
    return cells


def efforts(rows: Rows) -> tuple[list[str], list[list[str]]]:
    """The presets at 50 % beside published code."""
    lines = [[label, *judged(rows, row, "50 %"), "", ""] for row, label in PUBLISHED.items()]
    for row in ("fast", "balanced", "thorough", "best"):
        (run,) = runs_of(rows, row, "50 %")
        cost = [f"{run['core_minutes']:.0f}", f"{run['peak_resident_bytes'] / 2**30:.2f} GiB"]
        lines.append([f"**{row}**", *judged(rows, row, "50 %"), *cost])
    return ["50 %", *TEXTS.values(), "core minutes", "peak memory"], lines


def patterns(rows: Rows) -> tuple[list[str], list[list[str]]]:
    """Excess loss on WikiText-2 and C4 at other sparsities and patterns."""
    columns = ("60 %", "70 %", "4:8", "2:4")
    names = PUBLISHED | {row: f"**{row}**" for row in ("fast", "balanced", "thorough")}

    def cell(row: str, column: str) -> str:
        if not runs_of(rows, row, column):
            return ""
        return ", ".join(f"{statistics.mean(excess(rows, row, column, t)):.3f}" for t in TEXTS)

    lines = [[label, *(cell(row, c) for c in columns)] for row, label in names.items()]
    return ["", *columns], lines


def parts(rows: Rows) -> tuple[list[str], list[list[str]]]:
    """What each part brings, alone and together, at 50 % and with seed 0."""
    first = [r for r in rows if r["seed"] == 0]
    found = [name for name in OURS if runs_of(first, name, "50 %")]
    named = [x for x in found if x not in ("fast", "thorough", "best")]
    return ["50 %", *TEXTS.values()], [[name, *judged(first, name, "50 %")] for name in named]


TABLES = {"efforts": efforts, "patterns": patterns, "parts": parts}


def windows_file(args: argparse.Namespace, seed: int, folder: Path) -> Path:
    """The calibration windows of a seed, as a file that all methods read."""
    file = folder / f"windows-{seed}.safetensors"
    if not file.exists():
        tokenizer = load_tokenizer(resolve(args.model).folder)
        plan = WindowPlan(64, 512, seed, "random-crop")
        windows = make_windows(read_documents(args.calibration), tokenizer, plan)
        save_windows(windows, file, start=start_tokens(tokenizer))
    return file


def run_ours(
    args: argparse.Namespace, row: str, column: str, seed: int, windows: Path, out: Path
) -> dict[str, Any]:
    """Prune with Secateur; what it cost."""
    sparsity, pattern = COLUMNS[column]
    text: dict[str, Any] = {"calibration": windows}
    if filled_in(OURS[row], presets).get("distillation"):
        # the same 64 windows; a distillation also reads others of the text
        text = {"calibration": args.calibration, "windows": 64, "sequence_length": 512,
                "packing": "random-crop", "seed": seed}  # fmt: skip
    report = secateur.prune(
        args.model,
        output=out,
        pattern=pattern or "unstructured",
        sparsity=None if pattern else sparsity,
        **text,
        **OURS[row],
    )
    cost, learned = report.manifest.cost, report.manifest.distillation
    return {
        "seconds": cost.seconds,
        "peak_resident_bytes": cost.peak_resident_bytes,
        "zeros": report.sparsity,
        **({"distillation": learned} if learned else {}),
    }


def run_rival(
    args: argparse.Namespace, row: str, column: str, seed: int, windows: Path, out: Path
) -> dict[str, Any]:
    """Prune with published code in its own environment; what it cost."""
    sparsity, pattern = COLUMNS[column]
    checkout = args.alps if row == "alps" else args.wanda
    script = Path(__file__).parents[1] / "rivals/rivals.py"
    command = [args.rivals_python, script, row, checkout, resolve(args.model).folder, windows, out]
    command += ["--pattern", pattern] if pattern else ["--sparsity", sparsity]
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    subprocess.run(
        [str(x) for x in command], check=True, stdout=subprocess.DEVNULL, env=environment
    )
    cost: dict[str, Any] = json.loads((out / "rival.json").read_text(encoding="utf-8"))
    return {k: cost[k] for k in ("seconds", "peak_resident_bytes", "zeros")}


def judge(args: argparse.Namespace, model: str) -> dict[str, float]:
    """Perplexity on each text."""
    found = {}
    for name, file in (text.split("=", 1) for text in args.text):
        judged = secateur.evaluate(model, text=file, sequence_length=2048, windows=args.windows)
        found[name] = judged.perplexity
    return found


def main() -> None:
    """Fill the table, as far as asked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--calibration", default="boolq-calibration")
    parser.add_argument("--text", nargs="+", default=["boolq=boolq-held-out"])
    parser.add_argument("--windows", type=int, default=24)
    parser.add_argument("--only", nargs="*", default=[*RIVALS, "fast", "balanced", "best"])
    parser.add_argument("--columns", nargs="*", default=[*COLUMNS])
    parser.add_argument("--seeds", nargs="*", type=int, default=[0])
    parser.add_argument("--rivals-python", type=Path)
    parser.add_argument("--wanda", type=Path)
    parser.add_argument("--alps", type=Path)
    parser.add_argument("--name", default="presets")
    parser.add_argument("--keep-windows", type=Path, help="an existing folder for windows")
    args = parser.parse_args()
    torch.set_num_threads(1)
    print(heading())
    protocol = {"windows": args.windows, "sequence_length": 2048, "calibration": "64 x 512"}
    if not known_rows(args.name):
        dense = judge(args, args.model)
        row = {"row": "dense", "column": "", "seed": 0, "perplexity": dense}
        add(args.name, protocol, row)
    wanted = [(r, c, s) for s in args.seeds for c in args.columns for r in args.only]
    for row, column, seed in wanted:
        if (row, column, seed) in {
            (r["row"], r["column"], r["seed"]) for r in known_rows(args.name)
        }:
            continue
        with tempfile.TemporaryDirectory() as scratch:
            kept = args.keep_windows or Path(scratch)
            windows, out = windows_file(args, seed, kept), Path(scratch) / "pruned"
            run = run_rival if row in RIVALS else run_ours
            cost = run(args, row, column, seed, windows, out)
            cost["core_minutes"] = cost["seconds"] * torch.get_num_threads() / 60
            found = {"row": row, "column": column, "seed": seed, **cost,
                     "perplexity": judge(args, str(out))}  # fmt: skip
            shutil.rmtree(out)
        add(args.name, protocol, found)
        print(found, flush=True)


if __name__ == "__main__":
    main()
