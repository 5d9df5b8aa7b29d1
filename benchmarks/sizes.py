"""Sizes of compressed checkpoints: the table in docs/format.md.

    python benchmarks/sizes.py

SmolLM2-135M in bfloat16, pruned in several ways and stored in every way. What a matrix takes
unarchived depends on its zeros alone; what zstandard makes of it depends also on which weights were
kept, so three methods are measured, and one matrix of normally distributed weights. (The sample's
own weights come from a quantized file and repeat values; those that SparseGPT has changed do not.)
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import torch

import secateur
from hardware import keep, markdown
from secateur.runtime.archive import encode
from secateur.runtime.formats import Layout, formats

PRUNED = [
    ("magnitude", "unstructured", 0.0),
    ("magnitude", "unstructured", 0.5),
    ("wanda", "unstructured", 0.5),
    ("sparsegpt", "unstructured", 0.5),
    ("sparsegpt", "unstructured", 0.7),
    ("sparsegpt", "2:4", None),
]
CALIBRATION = {"calibration": "boolq-calibration", "windows": 16, "sequence_length": 256}
STORED = [("auto", False), ("int8", False), ("auto", True), ("int8", True)]
SIDE = 4096


def real(model: str, scratch: Path) -> list[dict[str, Any]]:
    """All ways to store the real model."""
    rows = []
    for method, pattern, sparsity in PRUNED:
        source = scratch / "pruned"
        secateur.prune(
            model,
            output=source,
            overwrite=True,
            method=method,
            pattern=pattern,
            sparsity=sparsity,
            dtype="bfloat16",
            **({} if method == "magnitude" else CALIBRATION),
        )
        for values, archive in STORED:
            report = secateur.compress(
                source,
                output=scratch / "stored",
                overwrite=True,
                values=values,
                embeddings=values,
                archive=archive,
            )
            told = report.to_json()
            del told["output"]
            rows.append({"method": method, "pattern": pattern, "values": values, **told})
    return rows


def normal(sparsity: float, values: str) -> float:
    """Bits per weight of an archived bitmask of normal weights."""
    weight = torch.randn(SIDE, SIDE, generator=torch.Generator().manual_seed(0)).bfloat16()
    threshold = weight.abs().flatten().float().kthvalue(int(sparsity * weight.numel())).values
    weight[weight.abs() <= threshold] = 0
    layout = Layout("bitmask", values, (SIDE, SIDE))
    parts = formats["bitmask"].pack(weight, layout)
    return 8 * sum(encode(part)[0].numel() for part in parts.values()) / weight.numel()


def main() -> None:
    """Measure, keep, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--name", default="sizes")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        rows = real(args.model, Path(scratch))
    shown = [
        [
            f"{row['sparsity']:.0%}" if row["pattern"] == "unstructured" else row["pattern"],
            row["method"] if row["sparsity"] > 0.01 else "none",
            ("bfloat16" if row["values"] == "auto" else "int8")
            + (", archive" if row["archive"] else ""),
            f"{row['linears']['bits_per_weight']:.3f}",
            f"{row['linears']['ratio']:.4f}",
            f"{row['ratio']:.4f}",
        ]
        for row in rows
    ]
    random = [
        {"sparsity": s, "values": v, "bits_per_weight": normal(s, v)}
        for s in (0.5, 0.7)
        for v in ("bfloat16", "int8")
    ]
    protocol = {"model": args.model, "dtype": "bfloat16", **CALIBRATION, "normal": random}
    print(f"written to {keep(args.name, protocol, rows)}")
    heads = ["zeros", "method", "stored as", "bits per weight", "linears", "whole model"]
    print(markdown(heads, shown))
    print(markdown(
        ["normal weights, zeros", "archive of", "bits per weight"],
        [[f"{x['sparsity']:.0%}", x["values"], f"{x['bits_per_weight']:.3f}"] for x in random],
    ))  # fmt: skip


if __name__ == "__main__":
    main()
