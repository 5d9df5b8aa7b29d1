"""The ALPS-class solver against the published ALPS: error and time, matrix by matrix.

    python -m benchmarks.quality.alps_solver --alps CHECKOUT --calibration c4.jsonl

Protocol: the dense model reads 64 windows of 512 tokens; weights and grams of query, output, gate
and down projection of some decoder layers are kept. Each matrix is pruned by the published code
(`alps.py` of mazumder-lab/ALPS with its own settings, `cuda:0` read as cpu) and by ours, one right
after the other in one process, with nothing else on the machine. The published code takes a matrix
by itself; ours is timed with `prepare`, though linears with the same input would share it. Error:
‖(W − Ŵ)X‖² / ‖WX‖² on the calibration inputs, in float64.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import torch
from benchmarks.hardware import heading, keep, markdown
from benchmarks.quality.refits import LINEARS, grams_of
from benchmarks.rivals.rivals import patched
from torch import Tensor

from secateur.calibration.documents import read_documents
from secateur.calibration.windows import WindowPlan, make_windows
from secateur.models.opening import load_whole
from secateur.models.sources import resolve
from secateur.models.tokenizer import load_tokenizer
from secateur.sparsity.patterns import parse_pattern
from secateur.sparsity.solvers import solvers

MEASURES = ("src/secateur/sparsity/solvers/alps.py",)

OURS = {"ours": {}, "ours, 30 iterations": {"iterations": 30, "growth": 1.3}}


def error(weight: Tensor, new: Tensor, gram: Tensor) -> float:
    """‖(W − Ŵ)X‖² / ‖WX‖² in float64."""
    weight, gram = weight.double(), gram.double()
    change = weight - new.double()
    return float((change @ gram * change).sum() / (weight @ gram * weight).sum())


def published(code: Any, weight: Tensor, gram: Tensor, column: str) -> tuple[float, Tensor]:
    """Seconds and weights of the published code."""
    linear = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    linear.weight.data = weight.clone()
    pruner = code.ALPS_prune(linear, 64, 512)
    pruner.XtX = gram.clone()
    n, m = (2, 4) if column == "2:4" else (0, 0)
    started = time.perf_counter()
    pruner.ALPS_admm(0.5, nm_n=n, nm_m=m, rho=0.1)
    return time.perf_counter() - started, linear.weight.detach()


def ours(
    settings: dict[str, Any], weight: Tensor, gram: Tensor, column: str
) -> tuple[float, Tensor]:
    """Seconds and weights of our solver."""
    pattern = parse_pattern(column if ":" in column else "unstructured")
    started = time.perf_counter()
    solver = solvers["alps"](**settings)
    found = solver.choose(weight, solver.prepare({"gram": gram}), pattern, 0.5)
    return time.perf_counter() - started, found.weight


def summary(rows: list[dict[str, Any]]) -> str:
    """By column and setting: the share of the published time, and how the errors compare."""
    lines = []
    for column in dict.fromkeys(row["column"] for row in rows):
        here = [row for row in rows if row["column"] == column]
        for solver in OURS:
            seconds = [sum(r[w]["seconds"] for r in here) for w in (solver, "published")]
            apart = [r[solver]["error"] / r["published"]["error"] - 1 for r in here]
            lines.append(
                f"{column}, {solver}: {seconds[0] / seconds[1]:.2f} of the time, "
                f"error {min(apart):+.2%} to {max(apart):+.2%}"
            )
    return "\n".join(lines)


def published_code(rows: list[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Errors and times relative to the published code."""
    lines = []
    for solver in OURS:
        apart = [row[solver]["error"] / row["published"]["error"] - 1 for row in rows]
        line = [solver, f"{min(apart):+.1%} to {max(apart):+.1%}"]
        for column in ("50 %", "2:4"):
            here = [row for row in rows if row["column"] == column]
            ours, theirs = (sum(r[w]["seconds"] for r in here) for w in (solver, "published"))
            line.append(f"{ours / theirs:.2f}")
        lines.append(line)
    return ["", "error", "time at 50 %", "time at 2:4"], lines


TABLES = {"published code": published_code}


def main() -> None:
    """Measure, keep, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--alps", type=Path, required=True)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--calibration", default="boolq-calibration")
    parser.add_argument("--layers", type=int, nargs="+", default=[1, 12, 25])
    parser.add_argument("--columns", nargs="+", default=["50 %", "2:4"])
    args = parser.parse_args()
    torch.set_num_threads(2)
    torch.cuda.synchronize = lambda *_: None
    code = patched(args.alps / "alps.py", "", "cpu")
    folder = resolve(args.model).folder
    model, tokenizer = load_whole(folder, torch.device("cpu")), load_tokenizer(folder)
    plan = WindowPlan(64, 512, 0, "random-crop")
    windows = make_windows(read_documents(args.calibration), tokenizer, plan)
    names = [f"model.layers.{i}.{linear}" for i in args.layers for linear in LINEARS]
    linears = {name: model.get_submodule(name) for name in names}
    grams = grams_of(model, linears, windows)
    weights = {name: linear.weight.detach().clone() for name, linear in linears.items()}
    del model, linears
    rows: list[dict[str, Any]] = []
    for column in args.columns:
        for name, weight in weights.items():
            gram = grams[name]
            row: dict[str, Any] = {"matrix": name, "column": column}
            for solver in ("published", *OURS):
                found = (
                    published(code, weight, gram, column)
                    if solver == "published"
                    else ours(OURS[solver], weight, gram, column)
                )
                row[solver] = {"seconds": found[0], "error": error(weight, found[1], gram),
                            "zeros": float((found[1] == 0).float().mean())}  # fmt: skip
            rows.append(row)
            print(row, flush=True)
    keep("alps-solver", {"calibration": "64 x 512", "seed": 0}, rows)
    print(heading())
    lines = [
        [row["column"], row["matrix"].removeprefix("model.")]
        + [f"{row[w]['error']:.5f}, {row[w]['seconds']:.2f} s" for w in ("published", *OURS)]
        for row in rows
    ]
    print(markdown(["", "matrix", "published", *OURS], lines))
    print(summary(rows))


if __name__ == "__main__":
    main()
