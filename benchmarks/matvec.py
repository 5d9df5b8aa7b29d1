"""One linear at a time: sparse kernels against the best dense ones, by shape, sparsity and batch.

    python benchmarks/matvec.py [--shapes 4096x4096 11008x4096] [--processes 5]

Protocol: random weights, the same number of random zeros everywhere; as many matrices of each kind
as exceed twice the L3 cache, so that weights come from memory as they do when a model decodes.
A round times one pass over the matrices of every kind, kinds after each other with a rest between
them, for idle threads of torch's pool keep spinning for some milliseconds. Several processes do
this after each other, because on a virtual machine it matters a lot which memory a process was
given; the median over rounds and processes counts, and the ratio is that of medians. Activations
are bfloat16. Dense baselines: torch's bfloat16 linear, torch's int8 weight-only product, and our
own dense kernels; the fastest of the same type is what a sparse kernel is compared with. The byte
limit is dense bytes over sparse bytes.
`--tier avx2` takes the kernels of older processors, which is then what `own` means.
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from hardware import heading, keep, markdown
from secateur.runtime.kernels.library import kernel_info, use_tier
from secateur.runtime.kernels.matrix import KernelMatrix

SPARSITIES = (0.5, 0.6, 0.7, 0.8)
WORKING_SET = 96 * 2**20
REST_SECONDS = 0.03


@functools.cache
def random_bits(rows: int, columns: int, kept: int) -> Tensor:
    """A bitmask with the same number of ones in each row."""
    mask = torch.rand(rows, columns).argsort(1) < kept
    powers = 2 ** torch.arange(8, dtype=torch.uint8)
    return (mask.view(rows, -1, 8) * powers).sum(2, dtype=torch.uint8)


def sparse(rows: int, columns: int, sparsity: float, dtype: torch.dtype) -> KernelMatrix:
    """A random matrix with the same number of zeros in each row."""
    kept = columns - round(sparsity * columns)
    return KernelMatrix(
        numbers(rows * kept, dtype),
        bitmask=random_bits(rows, columns, kept),
        columns=columns,
        scale=scale(rows, dtype),
    )


def numbers(count: int, dtype: torch.dtype) -> Tensor:
    """Random values."""
    if dtype == torch.int8:
        return torch.randint(-127, 128, (count,), dtype=dtype)
    return torch.randn(count).to(dtype)


def scale(rows: int, dtype: torch.dtype) -> Tensor | None:
    """One for each row of int8."""
    return torch.rand(rows) if dtype == torch.int8 else None


def copies(make: Callable[[], Any], nbytes: int) -> list[Any]:
    """As many as exceed the caches; all but the first share nothing with it but their numbers."""
    return [make() for _ in range(max(2, -(-WORKING_SET // nbytes)))]


def kinds(rows: int, columns: int, batch: int) -> dict[str, list[Callable[[], Any]]]:
    """For each kind a list of calls, one for each matrix of its working set."""
    x = torch.randn(batch, columns).bfloat16()
    found: dict[str, list[Callable[[], Any]]] = {}

    def enter(name: str, matrices: list[Any], call: Callable[[Any], Any]) -> None:
        found[name] = [lambda m=m: call(m) for m in matrices]

    size = rows * columns
    weights = copies(lambda: numbers(size, torch.bfloat16).view(rows, columns), 2 * size)
    enter("torch bf16", weights, lambda w: functional.linear(x, w))
    integers = copies(lambda: numbers(size, torch.int8).view(rows, columns), size)
    scales = torch.rand(rows).bfloat16()
    enter("torch int8", integers, lambda w: torch._weight_int8pack_mm(x, w, scales))
    for dtype, name, width in ((torch.bfloat16, "bf16", 2), (torch.int8, "int8", 1)):
        dense = copies(
            lambda d=dtype: KernelMatrix(
                numbers(size, d).view(rows, columns), scale=scale(rows, d)
            ),
            width * size,
        )
        enter(f"own {name}", dense, lambda m: m.multiply(x))
        for s in SPARSITIES:
            one = sparse(rows, columns, s, dtype)
            enter(
                f"{name} {s:.0%}",
                copies(lambda d=dtype, s=s: sparse(rows, columns, s, d), one.nbytes),
                lambda m: m.multiply(x),
            )
    return found


def measure(found: dict[str, list[Callable[[], Any]]], rounds: int) -> dict[str, list[float]]:
    """Milliseconds of each kind, one number for each round."""
    times: dict[str, list[float]] = {name: [] for name in found}
    for number in range(rounds + 1):
        for name, calls in found.items():
            time.sleep(REST_SECONDS)
            calls[-1]()
            started = time.perf_counter()
            for call in calls:
                call()
            if number:  # the first round warms up
                times[name].append(1e3 * (time.perf_counter() - started) / len(calls))
    return times


def in_processes(args: argparse.Namespace, shape: str, batch: int) -> dict[str, dict[str, float]]:
    """Times of all rounds of all processes: their median, and the least and largest."""
    pooled: dict[str, list[float]] = {}
    command = [sys.executable, __file__, "--tier", args.tier, "--rounds", str(args.rounds)]
    for _ in range(args.processes):
        told = subprocess.run(
            [*command, "--one", shape, str(batch)], check=True, capture_output=True, text=True
        ).stdout
        for name, times in json.loads(told.splitlines()[-1]).items():
            pooled.setdefault(name, []).extend(times)
    return {
        name: {"median_ms": statistics.median(t), "least_ms": min(t), "most_ms": max(t)}
        for name, t in pooled.items()
    }


def row_of(shape: str, batch: int, times: dict[str, dict[str, float]]) -> list[dict[str, Any]]:
    """Ratios of each sparse kind to the best dense one of its type."""
    rows = []
    for name, width in (("bf16", 16), ("int8", 8)):
        dense = {k: times[k]["median_ms"] for k in (f"torch {name}", f"own {name}")}
        best = min(dense, key=lambda k: dense[k])
        for s in SPARSITIES:
            at = times[f"{name} {s:.0%}"]
            ratio = dense[best] / at["median_ms"]
            limit = width / (width * (1 - s) + 1)
            rows.append(
                {
                    "shape": shape,
                    "batch": batch,
                    "values": name,
                    "sparsity": s,
                    **at,
                    "dense_ms": dense,
                    "best_dense": best,
                    "ratio": ratio,
                    "share_of_limit": ratio / limit,
                    "ratio_to_torch_bf16": times["torch bf16"]["median_ms"] / at["median_ms"],
                }
            )
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """As it stands in the documentation."""
    columns = ["shape", "batch", "values", "sparsity", "ms", "best dense", "ratio"]
    columns += ["of the byte limit", "to torch bf16"]
    lines = []
    for r in rows:
        best = f"{r['best_dense']} {r['dense_ms'][r['best_dense']]:.3f}"
        told = [
            r["shape"],
            r["batch"],
            r["values"],
            f"{r['sparsity']:.0%}",
            f"{r['median_ms']:.3f}",
        ]
        told += [best, f"{r['ratio']:.2f}", f"{r['share_of_limit']:.0%}"]
        lines.append([str(x) for x in [*told, f"{r['ratio_to_torch_bf16']:.2f}"]])
    return markdown(columns, lines)


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", nargs="+", default=["4096x4096", "11008x4096"])
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--processes", type=int, default=5)
    parser.add_argument("--one", nargs=2, help="used by itself: one shape and batch in one process")
    parser.add_argument("--tier", default=kernel_info().tier)
    parser.add_argument("--name", default="matvec")
    args = parser.parse_args()
    use_tier(args.tier)
    if args.one:
        out, columns = (int(n) for n in args.one[0].split("x"))
        print(json.dumps(measure(kinds(out, columns, int(args.one[1])), args.rounds)))
        return
    print(heading(), "tier", args.tier, kernel_info().threads, "threads")
    rows: list[dict[str, Any]] = []
    for shape in args.shapes:
        for batch in args.batches:
            rows += row_of(shape, batch, in_processes(args, shape, batch))
    keep(
        args.name,
        {
            "tier": args.tier,
            "rounds": args.rounds,
            "processes": args.processes,
            "protocol": __doc__,
        },
        rows,
    )
    print(table(rows))


if __name__ == "__main__":
    main()
