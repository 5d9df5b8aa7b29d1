"""Sizes of compressed checkpoints: the table in docs/format.md.

    python -m benchmarks.memory.sizes [--scratch DIR]

SmolLM2-135M in bfloat16, pruned in several ways and stored in every way. What a matrix takes
unarchived depends on its zeros alone; what zstandard makes of it depends also on the kept weights.
The sample's own weights come from a quantized file and repeat values; those that SparseGPT has
changed do not.

`--scratch` names a folder that keeps the pruned models for the next call.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.hardware import keep, markdown

import secateur

MEASURES = ("src/secateur/runtime/formats",)
PROOF = ("llama/compress", "llama/bitmask", "llama/int8", "llama/n-of-m", "llama/archive")
MINUTES = 9

PRUNED = [
    ("magnitude", "unstructured", 0.0),
    ("sparsegpt", "unstructured", 0.5),
    ("sparsegpt", "unstructured", 0.7),
    ("sparsegpt", "2:4", None),
]
CALIBRATION = {"calibration": "boolq-calibration", "windows": 16, "sequence_length": 256}
STORED = [("auto", False), ("int8", False), ("auto", True), ("int8", True)]


def pruned(model: str, scratch: Path, method: str, pattern: str, sparsity: float | None) -> Path:
    """The pruned model, made unless the folder has it."""
    folder = scratch / f"{method}-{pattern.replace(':', '-')}-{sparsity}"
    if not folder.exists():
        secateur.prune(
            model,
            output=folder,
            resume=True,
            method=method,
            pattern=pattern,
            sparsity=sparsity,
            dtype="bfloat16",
            **({} if method == "magnitude" else CALIBRATION),
        )
    return folder


def real(model: str, scratch: Path) -> list[dict[str, Any]]:
    """All ways to store the real model."""
    rows = []
    for method, pattern, sparsity in PRUNED:
        source = pruned(model, scratch, method, pattern, sparsity)
        for values, archive in STORED:
            report = secateur.compress(
                source,
                output=scratch / "stored",
                overwrite=True,
                values=values,
                embeddings=values,
                archive=archive,
            )
            record = report.to_json()
            del record["output"]
            rows.append({"method": method, "pattern": pattern, "values": values, **record})
    return rows


def stored(rows: list[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Bits of a weight of the linears, and sizes as fractions of dense bfloat16."""
    lines = [
        [
            f"{row['sparsity']:.0%}" if row["pattern"] == "unstructured" else row["pattern"],
            ("bfloat16" if row["values"] == "auto" else "int8")
            + (", archive" if row["archive"] else ""),
            f"{row['linears']['bits_per_weight']:.2f}",
            f"{row['linears']['ratio']:.3f}",
            f"{row['ratio']:.3f}",
        ]
        for row in rows
        if row["method"] == "sparsegpt"
    ]
    columns = ["zeros, by SparseGPT", "stored as", "bits per weight", "linear layers"]
    return [*columns, "whole model"], lines


TABLES = {"stored": stored}


def main() -> None:
    """Measure, keep, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--name", default="sizes")
    parser.add_argument("--scratch", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        scratch = args.scratch or Path(temporary)
        rows = real(args.model, scratch)
    protocol = {"model": args.model, "dtype": "bfloat16", **CALIBRATION}
    print(f"written to {keep(args.name, protocol, rows)}")
    print(markdown(*stored(rows)))


if __name__ == "__main__":
    main()
