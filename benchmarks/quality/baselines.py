"""Perplexity and cost of every method on SmolLM2-135M: the table in README.md.

    python -m benchmarks.quality.baselines                                     # sample texts, no hub
    python -m benchmarks.quality.baselines --calibration WINDOWS.safetensors --text FILE --paper

Protocol: 64 calibration windows of 512 tokens, float32, 2 threads; perplexity on non-overlapping
windows of 512 tokens of text that was not used for calibration, loss over each window's own next
tokens. Seconds are those of the pruning step alone (layers, without fetching, copying, verifying).
`--paper` uses the papers' order of work (`--sequential layer`), to compare with the official code.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from benchmarks.hardware import heading, keep, markdown

import secateur

RUNS = [
    ("magnitude", "unstructured"),
    ("ria", "unstructured"),
    ("wanda", "unstructured"),
    ("sparsegpt", "unstructured"),
    ("wanda", "2:4"),
    ("sparsegpt", "2:4"),
    ("taylor", "unstructured"),
]


def measure(method: str, pattern: str, args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Prune, judge, forget."""
    report = secateur.prune(
        args.model,
        output=folder,
        method=method,
        pattern=pattern,
        sparsity=None if ":" in pattern else args.sparsity,
        calibration=args.calibration,
        windows=64,
        sequence_length=512,
        sequential="layer" if args.paper else "group",
    )
    judged = secateur.evaluate(folder, text=args.text, sequence_length=512, windows=args.windows)
    shutil.rmtree(folder)
    return {
        "method": method,
        "pattern": pattern,
        "sparsity": report.sparsity,
        "perplexity": judged.perplexity,
        "seconds": sum(layer["seconds"] for layer in report.layers),
        "peak_resident_bytes": report.manifest.cost.peak_resident_bytes,
        "protocol": judged.protocol,
    }


def main() -> None:
    """Measure the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--calibration", default="boolq-calibration")
    parser.add_argument("--text", default="boolq-held-out")
    parser.add_argument("--windows", type=int, default=40)
    parser.add_argument("--sparsity", type=float, default=0.5)
    parser.add_argument(
        "--only", nargs="*", default=None, help="method:pattern, for example wanda:2:4"
    )
    parser.add_argument("--paper", action="store_true")
    parser.add_argument("--name", default="baselines")
    args = parser.parse_args()
    torch.set_num_threads(2)
    print(heading())
    dense = secateur.evaluate(args.model, text=args.text, sequence_length=512, windows=args.windows)
    rows = [
        {"method": "dense", "pattern": "", "sparsity": 0.0, "perplexity": dense.perplexity,
         "protocol": dense.protocol}
    ]  # fmt: skip
    wanted = [r for r in RUNS if args.only is None or f"{r[0]}:{r[1]}" in args.only]
    with tempfile.TemporaryDirectory() as scratch:
        for method, pattern in wanted:
            rows.append(measure(method, pattern, args, Path(scratch) / "pruned"))
            print({k: v for k, v in rows[-1].items() if k != "protocol"}, flush=True)
    protocol = {
        "calibration": args.calibration, "samples": 64, "sequence_length": 512, "text": args.text,
        "sequential": "layer" if args.paper else "group",
    }  # fmt: skip
    print(f"written to {keep(args.name, protocol, rows)}")
    shown = [
        [
            r["method"], r["pattern"], f"{r['sparsity']:.1%}", f"{r['perplexity']:.2f}",
            f"{r['seconds']:.0f} s" if "seconds" in r else "",
            f"{r['peak_resident_bytes'] / 2**30:.2f} GiB" if "seconds" in r else "",
        ]
        for r in rows
    ]  # fmt: skip
    print(markdown(["method", "pattern", "zeros", "perplexity", "time", "peak memory"], shown))


if __name__ == "__main__":
    main()
