"""One linear at a time: sparse kernels against the best dense ones, by shape, sparsity and batch.

    python -m benchmarks.speed.matvec [--shapes 4096x4096 11008x4096] [--processes 5] [--values int8 int4]

Protocol: random weights, the same number of random zeros in each row; as many matrices of each kind
as exceed twice the last cache, so that weights come from memory as they do when a model decodes.
A round times one pass over the matrices of every kind, kinds after each other with a rest between
them, for idle threads of torch's pool keep spinning for some milliseconds. Several processes do
this after each other, because on a virtual machine it matters a lot which memory a process was
given; the median over matrices, rounds and processes counts, and the ratio is that of medians.
Activations are bfloat16. Dense baselines: torch's bfloat16 linear, torch's int8 weight-only
product, and our own dense kernels; the fastest of the same type is what a sparse kernel is compared
with. int4 has groups of `--group` weights; torch has no int4 for a CPU that does not round
activations and scales differently, so dense int4 is ours. The byte limit is dense bytes over sparse
bytes in memory. Ours are in large pages, as when a model is loaded.
`--tier avx2` takes the kernels of older processors, which is then what `own` means.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from benchmarks.hardware import heading, keep, markdown
from torch.nn import functional

from secateur.evaluation.random_models import another, random_matrix
from secateur.runtime.kernels.library import kernel_info, use_tier
from secateur.runtime.kernels.matrix import to_large_pages
from secateur.timing import alternate, seconds_of

MEASURES = ("src/secateur/runtime/kernels",)


def last_cache_bytes() -> int:
    """The size of the third cache of the first processor; 0 where the system does not say."""
    file = Path("/sys/devices/system/cpu/cpu0/cache/index3/size")
    return 2**10 * int(file.read_text().strip().removesuffix("K")) if file.exists() else 0


SPARSITIES = (0.5, 0.6, 0.7, 0.8)
WORKING_SET = 2 * max(48 * 2**20, last_cache_bytes())
REST_SECONDS = 0.03


def copies(one: Any, nbytes: int, copied: Callable[[Any], Any]) -> list[Any]:
    """As many as exceed the caches."""
    return [one] + [copied(one) for _ in range(max(1, WORKING_SET // nbytes))]


def kinds(
    rows: int, columns: int, batch: int, values: list[str], group: int
) -> dict[str, list[Callable[[], Any]]]:
    """For each kind a list of calls, one for each matrix of its working set."""
    x = torch.randn(batch, columns).bfloat16()
    found: dict[str, list[Callable[[], Any]]] = {}

    def enter(name: str, matrices: list[Any], call: Callable[[Any], Any]) -> None:
        found[name] = [lambda m=m: call(m) for m in matrices]

    size = rows * columns
    if "bf16" in values:
        weight = torch.randn(rows, columns).bfloat16()
        enter(
            "torch bf16", copies(weight, 2 * size, torch.clone), lambda w: functional.linear(x, w)
        )
    if "int8" in values:
        integers = torch.randint(-127, 128, (rows, columns), dtype=torch.int8)
        scales = torch.rand(rows).bfloat16()
        enter(
            "torch int8",
            copies(integers, size, torch.clone),
            lambda w: torch._weight_int8pack_mm(x, w, scales),
        )
    for name in values:
        for sparsity in (0.0, *SPARSITIES):
            one = random_matrix(rows, columns, name, sparsity, group)
            kind = f"{name} {sparsity:.0%}" if sparsity else f"own {name}"
            matrices = copies(one, one.nbytes, another)
            to_large_pages(matrices)
            enter(kind, matrices, lambda m: m.multiply(x))
    return found


def measure(found: dict[str, list[Callable[[], Any]]], rounds: int) -> dict[str, list[float]]:
    """Milliseconds of each kind, one number for each matrix and round."""

    def after_a_rest(calls: list[Callable[[], Any]]) -> list[float]:
        time.sleep(REST_SECONDS)
        calls[-1]()
        return [1e3 * seconds_of(call) for call in calls]

    def after_the_first(turns: list[list[float]]) -> list[float]:
        return [each for turn in turns[1:] for each in turn]  # the first round warms up

    times = alternate([*found.values()], after_a_rest, after_the_first, turns=rounds + 1)
    return dict(zip(found, times, strict=True))


def in_processes(args: argparse.Namespace, shape: str, batch: int) -> dict[str, dict[str, float]]:
    """Times of all rounds of all processes: their median, and the fastest and slowest twentieth."""
    pooled: dict[str, list[float]] = {}
    command = [
        sys.executable,
        "-m",
        "benchmarks.speed.matvec",
        "--tier",
        args.tier,
        "--rounds",
        str(args.rounds),
    ]
    command += ["--group", str(args.group), "--values", *args.values]
    for _ in range(args.processes):
        output = subprocess.run(
            [*command, "--one", shape, str(batch)], check=True, capture_output=True, text=True
        ).stdout
        for name, times in json.loads(output.splitlines()[-1]).items():
            pooled.setdefault(name, []).extend(times)
    return {name: spread(times) for name, times in pooled.items()}


def spread(times: list[float]) -> dict[str, float]:
    """Median, and the bounds of the fastest and the slowest twentieth."""
    twentieths = statistics.quantiles(times, n=20)
    return {
        "median_ms": statistics.median(times),
        "fast_ms": twentieths[0],
        "slow_ms": twentieths[-1],
    }


def row_of(
    shape: str, batch: int, values: str, group: int, times: dict[str, dict[str, float]]
) -> list[dict[str, Any]]:
    """Ratios of each sparse kind to the best dense one of its type, and of dense ones."""
    width = {"bf16": 16.0, "int8": 8.0, "int4": 4.0}[values]
    scales = 8 / group if values == "int4" else 0.0
    dense = {k: t["median_ms"] for k, t in times.items() if k.split(" ")[1:] == [values]}
    best = min(dense, key=lambda k: dense[k])
    rows = []
    for s in SPARSITIES:
        at = times[f"{values} {s:.0%}"]
        # pairs of rows of int4 share a mask, and have a byte for what either keeps
        stored = 4 * (1 - s * s) + 0.5 if values == "int4" else width * (1 - s) + 1
        row = {
            "shape": shape,
            "batch": batch,
            "values": values,
            "sparsity": s,
            **at,
            "dense_ms": dense,
            "best_dense": best,
            "ratio": dense[best] / at["median_ms"],
            "ratio_of_fast": times[best]["fast_ms"] / at["fast_ms"],
            "byte_limit": (width + scales) / (stored + scales),
        }
        row["share_of_limit"] = row["ratio"] / row["byte_limit"]
        for other in ("own int8", "torch bf16"):
            if other in times:
                row[f"ratio_to_{other.replace(' ', '_')}"] = (
                    times[other]["median_ms"] / at["median_ms"]
                )
        rows.append(row)
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """As it stands in the documentation."""
    columns = ["shape", "batch", "values", "sparsity", "ms", "best dense", "ratio", "of fast ones"]
    columns += ["byte limit", "to dense int8", "to torch bf16"]
    lines = []
    for r in rows:
        cells = [r["shape"], r["batch"], r["values"], f"{r['sparsity']:.0%}"]
        cells += [
            f"{r['median_ms']:.3f}",
            f"{r['best_dense']} {r['dense_ms'][r['best_dense']]:.3f}",
        ]
        cells += [f"{r[key]:.2f}" for key in ("ratio", "ratio_of_fast", "byte_limit")]
        for key in ("ratio_to_own_int8", "ratio_to_torch_bf16"):
            cells.append(f"{r[key]:.2f}" if key in r else "")
        lines.append([str(x) for x in cells])
    return markdown(columns, lines)


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", nargs="+", default=["4096x4096", "11008x4096"])
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--values", nargs="+", default=["bf16", "int8", "int4"])
    parser.add_argument("--group", type=int, default=64, help="of int4")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--processes", type=int, default=5)
    parser.add_argument("--one", nargs=2, help="used by itself: one shape and batch in one process")
    parser.add_argument("--tier", default=kernel_info().tier)
    parser.add_argument("--name", default="matvec")
    args = parser.parse_args()
    use_tier(args.tier)
    if args.one:
        out, columns = (int(n) for n in args.one[0].split("x"))
        found = kinds(out, columns, int(args.one[1]), args.values, args.group)
        print(json.dumps(measure(found, args.rounds)))
        return
    print(heading(), "tier", args.tier, kernel_info().threads, "threads")
    rows: list[dict[str, Any]] = []
    for shape in args.shapes:
        for batch in args.batches:
            times = in_processes(args, shape, batch)
            for values in args.values:
                rows += row_of(shape, batch, values, args.group, times)
    protocol = {"tier": args.tier, "rounds": args.rounds, "processes": args.processes}
    protocol |= {"group": args.group, "working_set_bytes": WORKING_SET, "protocol": __doc__}
    keep(args.name, protocol, rows)
    print(table(rows))


if __name__ == "__main__":
    main()
