"""Prune SmolLM2-135M in one and in two processes of one machine: work, masks, perplexity.

    python -m benchmarks.speed.several [--processes 1 2] [--methods wanda sparsegpt]

Every run is started by torchrun, also that of one process, with one thread in each process. The
work is what the processors did for the whole command, divided by the number of processes: other
programs on the machine change it little. The clock is stored beside it, for the whole command and
for its decoder layers as the ledger has them. Zeros are compared with those of one process.
Perplexity is measured by `secateur evaluate` in as many processes as have pruned.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.hardware import heading, keep
from safetensors import safe_open

MEASURES = ("src/secateur/parallel", "src/secateur/engine")

ONE_THREAD = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


def worked() -> float:
    """The seconds that processors have worked for ended processes of this one."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def launched(processes: int, words: list[str]) -> tuple[str, float, float]:
    """Run a command in so many processes.

    Returns what it prints, its seconds, and the seconds of work of each process.
    """
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command = [*start, f"--nproc-per-node={processes}", "-m", "secateur", *words]
    began, before = time.perf_counter(), worked()
    done = subprocess.run(command, capture_output=True, text=True, env=ONE_THREAD)
    if done.returncode:
        sys.exit(done.stderr[-4000:])
    work = (worked() - before) / processes
    return done.stdout, time.perf_counter() - began, work


def prune(args: argparse.Namespace, method: str, processes: int, output: Path) -> dict[str, Any]:
    """Prune, and return the times."""
    words = [
        "prune", args.model, "--output", str(output), "--method", method, "--sparsity", "0.5",
        "--calibration", args.calibration, "--windows", str(args.windows),
        "--sequence-length", str(args.length), "--sequential", args.sequential, "--json",
    ]  # fmt: skip
    _, seconds, work = launched(processes, words)
    lines = (output / "secateur" / "layers.jsonl").read_text().splitlines()
    layers = [json.loads(line)["seconds"] for line in lines]
    return {"seconds": seconds, "layer_seconds": sum(layers), "work_seconds": work}


def moved(one: Path, other: Path) -> tuple[int, int]:
    """Weights that are zero in only one of two models, and all weights of the decoder layers."""
    differing = weights = 0
    with (
        safe_open(one / "model.safetensors", "pt") as ours,
        safe_open(other / "model.safetensors", "pt") as theirs,
    ):
        for name in sorted(ours.keys()):
            if ".layers." in name:
                a, b = ours.get_tensor(name) == 0, theirs.get_tensor(name) == 0
                differing, weights = differing + int((a != b).sum()), weights + a.numel()
    return differing, weights


def perplexity(args: argparse.Namespace, processes: int, model: Path) -> float:
    """The perplexity of a model, measured in so many processes."""
    words = ["evaluate", str(model), "--text", args.text, "--windows", str(args.judged), "--json"]
    output, *_ = launched(processes, [*words, "--sequence-length", str(args.length)])
    found: float = json.loads(output)["perplexity"][0]["perplexity"]
    return found


def together(rows: list[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Zeros, perplexity, and the work of each process."""
    names = {"wanda": "Wanda", "sparsegpt": "SparseGPT"}
    columns = ["method", "processes", "zeros that moved", "perplexity", "work of each process"]
    return columns, [
        [
            names[row["method"]], str(row["processes"]), f"{row['moved_zeros']:,}",
            f"{row['perplexity']:.4f}", f"{row['work_seconds']:.1f} s",
        ]
        for row in rows
    ]  # fmt: skip


TABLES = {"together": together}


def main() -> None:
    """Prune with each method in each number of processes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--methods", nargs="+", default=["wanda", "sparsegpt"])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--calibration", default="boolq-calibration")
    parser.add_argument("--windows", type=int, default=12)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--sequential", default="group")
    parser.add_argument("--text", default="boolq-held-out")
    parser.add_argument("--judged", type=int, default=8)
    args = parser.parse_args()
    print(heading())
    rows: list[dict[str, Any]] = []
    for method in args.methods:
        with tempfile.TemporaryDirectory() as scratch:
            first = Path(scratch) / "first"
            for processes in args.processes:
                output = Path(scratch) / f"{processes}"
                row = {"method": method, "processes": processes}
                row |= prune(args, method, processes, output)
                if not first.exists():
                    output.rename(first)
                    output = first
                row["perplexity"] = perplexity(args, processes, output)
                row["moved_zeros"], row["weights"] = moved(first, output)
                rows.append(row)
                before = next(known for known in rows if known["method"] == method)
                row["share"] = row["work_seconds"] / before["work_seconds"]
                print(json.dumps(row), flush=True)
                if output != first:
                    shutil.rmtree(output)
    print(keep("several", vars(args), rows))


if __name__ == "__main__":
    main()
