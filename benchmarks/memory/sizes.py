"""Sizes of compressed checkpoints: the table in docs/format.md.

    python -m benchmarks.memory.sizes [--grids] [--scratch DIR]

SmolLM2-135M in bfloat16, pruned in several ways and stored in every way. What a matrix takes
unarchived depends on its zeros alone; what zstandard makes of it depends also on which weights were
kept, so three methods are measured, and one matrix of normally distributed weights. (The sample's
own weights come from a quantized file and repeat values; those that SparseGPT has changed do not.)

`--grids` measures int4 and int3 instead, rounded to the nearest. Beside bits per weight it tells
the theory, counted weight by weight from the table of docs/format.md without any rounding to bytes,
and of archives the entropy: for each matrix, that of the places of zeros given their number in the
matrix (of n-of-m: of the codes), of the values, of the scale bytes and of the exponents, each drawn
independently with the frequencies of the matrix.

`--scratch` names a folder that keeps the pruned models for the next call.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import torch
from benchmarks.hardware import keep, markdown

import secateur
from secateur.runtime.formats import Layout, formats
from secateur.runtime.formats.bits import unpack_numbers
from secateur.runtime.formats.n_of_m import code_bits
from secateur.runtime.packed import SMALLEST_BYTES, PackedCheckpoint, to_archive

MEASURES = ("src/secateur/runtime/formats",)

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

PRUNED_FOR_GRIDS = [("sparsegpt", "unstructured", 0.5), ("sparsegpt", "2:4", None)]
GRIDS = [("int4", 32), ("int4", 64), ("int4", 128), ("int3", 64)]


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


def theory(layout: Layout, nonzeros: int) -> float:
    """Bits of a matrix after the table of docs/format.md, fractions of bytes counted."""
    bits, scales = layout.grid.bits, layout.weights * 8 / layout.group + 8 * layout.shape[0]
    if layout.format == "dense":
        return bits * layout.weights + scales
    if layout.format == "bitmask":
        return layout.weights + bits * nonzeros + scales
    kept, group = layout.kept_of_group
    return layout.weights / group * (code_bits(kept, group) + bits * kept) + scales


def entropy(numbers: torch.Tensor) -> float:
    """Bits of independent numbers with these frequencies."""
    counts = numbers.unique(return_counts=True)[1].double()
    return float(-(counts * (counts / counts.sum()).log2()).sum())


def places(parts: dict[str, torch.Tensor], layout: Layout, mask: torch.Tensor) -> float:
    """Bits that tell which weights are kept."""
    if layout.format == "dense":
        return 0.0
    if layout.format == "bitmask":
        return entropy(mask)
    kept, group = layout.kept_of_group
    groups = layout.shape[1] // group
    return entropy(unpack_numbers(parts["codes"], code_bits(kept, group), groups))


def counted(folder: Path) -> dict[str, float]:
    """Theory, entropy and archive of the linears of a folder, in bits per weight."""
    packed, found = PackedCheckpoint(folder), {"theory": 0.0, "entropy": 0.0, "archive": 0.0}
    weights = 0
    for name, layout in packed.layouts.items():
        if layout.grid is None:
            continue
        parts = packed.parts(name)
        mask, values = formats[layout.format].kept(parts, layout)
        specs = formats[layout.format].parts(layout, values.numel())
        found["theory"] += theory(layout, values.numel())
        found["archive"] += 8 * sum(
            to_archive(part, specs[suffix].width)[0].numel() if part.nbytes > SMALLEST_BYTES
            else part.nbytes
            for suffix, part in parts.items()
        )  # fmt: skip
        if layout.format == "dense":  # which stores its zeros as values
            values = torch.zeros(layout.shape, dtype=values.dtype).masked_scatter(mask, values)
        found["entropy"] += places(parts, layout, mask) + entropy(values)
        found["entropy"] += entropy(parts["weight_scale"]) + entropy(parts["weight_exponent"])
        weights += layout.weights
    return {kind: bits / weights for kind, bits in found.items()}


def grids(model: str, scratch: Path) -> list[dict[str, Any]]:
    """The grids of one model with zeros of two kinds."""
    rows = []
    for method, pattern, sparsity in PRUNED_FOR_GRIDS:
        source = pruned(model, scratch, method, pattern, sparsity)
        for values, group in GRIDS:
            report = secateur.compress(
                source,
                output=scratch / "stored",
                overwrite=True,
                values=values,
                group_size=group,
                embeddings="int8",
            )
            row = {"pattern": pattern, "values": values, "group": group}
            row |= {"sparsity": report.sparsity, "model": report.ratio}
            row |= {"stored": report.linears.bits_per_weight}
            rows.append({**row, **counted(scratch / "stored")})
            print(rows[-1], flush=True)
    return rows


def show_grids(rows: list[dict[str, Any]]) -> str:
    """The table of docs/format.md."""
    heads = ["zeros", "values", "bits per weight", "theory", "archive", "entropy", "whole model"]
    return markdown(heads, [
        [
            f"{row['sparsity']:.0%}" if row["pattern"] == "unstructured" else row["pattern"],
            f"{row['values']}, groups of {row['group']}",
            f"{row['stored']:.3f}",
            f"{row['theory']:.3f} ({row['stored'] / row['theory'] - 1:+.2%})",
            f"{row['archive']:.3f}",
            f"{row['entropy']:.3f} ({row['archive'] / row['entropy'] - 1:+.2%})",
            f"{row['model']:.4f}",
        ]
        for row in rows
    ])  # fmt: skip


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


def normal(sparsity: float, values: str) -> float:
    """Bits per weight of an archived bitmask of normal weights."""
    weight = torch.randn(SIDE, SIDE, generator=torch.Generator().manual_seed(0)).bfloat16()
    threshold = weight.abs().flatten().float().kthvalue(int(sparsity * weight.numel())).values
    weight[weight.abs() <= threshold] = 0
    layout = Layout("bitmask", values, (SIDE, SIDE))
    parts = formats["bitmask"].pack(weight, layout)
    return 8 * sum(to_archive(part)[0].numel() for part in parts.values()) / weight.numel()


def main() -> None:
    """Measure, keep, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--name", default="sizes")
    parser.add_argument("--grids", action="store_true")
    parser.add_argument("--scratch", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        scratch = args.scratch or Path(temporary)
        if args.grids:
            rows = grids(args.model, scratch)
            protocol = {"model": args.model, "dtype": "bfloat16", **CALIBRATION}
            print(f"written to {keep(f'{args.name}-grids', protocol, rows)}")
            print(show_grids(rows))
            return
        rows = real(args.model, scratch)
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
