"""Everything that is claimed of GPUs, on one GPU: products, models, pruning.

    python -m benchmarks.speed.gpu --minutes 9            fills benchmarks/results/gpu.json, row by row
    python -m benchmarks.speed.gpu --minutes 9            goes on where it stopped
    python -m benchmarks.speed.gpu --table                prints what is there
    python -m benchmarks.speed.gpu --dry --results DIR    tiny shapes in Triton's interpreter, on a CPU

A row that is there is not measured again; a row of another GPU or another release of torch is. Each
row has an estimate of its seconds, and begins only if so many are left of `--minutes`.

Protocol. Products: random weights and random zeros; the ways take turns, and medians count; before
each call the second cache is filled with other numbers, and launching does not count
(`kernels/gpu/linear.py`). Models: random weights of Llama-2-7B's shape in bfloat16, the dense model
and a contender in turns, wall clock, batch 1. Pruning: random weights of the same shape, windows of
random tokens; of methods that take long only some layers, which are all alike.
"""

from __future__ import annotations

import argparse
import gc
import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks import stored

MEASURES = ("src/secateur/runtime",)

LAYERS = 32
LLAMA_7B = {
    "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 32, "max_position_embeddings": 4096,
}  # fmt: skip
QWEN3_30B_A3B = {
    **LLAMA_7B, "hidden_size": 2048, "num_hidden_layers": 48, "num_key_value_heads": 4,
    "head_dim": 128, "num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 768,
    "norm_topk_prob": True,
}  # fmt: skip
TINY = {
    "vocab_size": 96, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1,
    "num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 64,
}  # fmt: skip

TINY_MIXTURE = {
    **TINY, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32,
}  # fmt: skip

BOUNDS = {"wanda": 2, "sparsegpt": 8, "alps": 15}
"""Minutes that pruning a model of 7 billion parameters may take."""


class Row(NamedTuple):
    """One row: its name, an estimate of its seconds on an H100, and what measures it."""

    name: str
    seconds: float
    measure: Callable[[], dict[str, Any]]


def rows_of(scale: Any, scratch: Path, layers: int, few: int) -> list[Row]:
    """All rows; those that settle most come first.

    Args:
        scale: `gpu_rows.Scale`.
        scratch: for checkpoints.
        layers: of a whole model that is pruned.
        few: layers of a model that is pruned by a method that takes long.
    """
    from benchmarks.speed import gpu_rows as measure

    def named(values: str, shape: tuple[int, int]) -> str:
        return f"product {shape[0]}x{shape[1]} {values}"

    products = [
        Row(f"{named(v, s)} {z:.0%}", 25, partial(measure.product_row, scale, s, v, z))
        for v, z in (("bf16", 0.5), ("int8", 0), ("int4", 0), ("bf16", 0.7))
        for s in scale.shapes
    ]
    cores = [  # torch has no such tensors on a CPU
        Row(named("2:4", s), 15, partial(measure.sparse_core_row, scale, s))
        for s in scale.shapes
        if scale.device == "cuda"
    ]
    models = [
        Row(f"model {c}", 75, partial(measure.model_row, scale, c))
        for c in (*measure.VALUES, "2:4")
    ]
    judged = [
        Row(f"evaluate {v}", 150, partial(measure.evaluate_row, scale, v, few, scratch))
        for v in ("dense", "int4")
    ]
    balanced, wanda = {"effort": "balanced"}, {"method": "wanda"}
    pruned = [
        Row(f"prune {m} {n}", t, partial(measure.prune_row, scale, how, n, scratch))
        for m, how, n, t in (
            ("wanda", wanda, few, 60),
            ("balanced", balanced, few, 300),
            ("sparsegpt", {"method": "sparsegpt"}, few, 120),
            ("alps", {"method": "alps"}, few, 240),
            ("wanda", wanda, layers, 330),
        )
    ]
    mixtures = [
        Row(f"prune mixture-{m} {few}", t, partial(measure.prune_row, scale, how, few, scratch,
                                                   mixture=True))
        for m, how, t in (("wanda", wanda, 180), ("balanced", balanced, 420))
    ]  # fmt: skip
    return [
        *products,
        *cores[:3],
        *models,
        *judged,
        *pruned[:2],
        *mixtures,
        *cores[3:],
        *pruned[2:],
    ]


def measure_all(
    rows: Sequence[Row], known: set[str], deadline: float, keep: Callable[[dict[str, Any]], None]
) -> list[str]:
    """Measure rows until time is short; returns the names of those that are left.

    A row that fails is kept with its error, and does not stop the others.
    """
    left = []
    for row in rows:
        if row.name in known:
            continue
        if time.monotonic() + row.seconds > deadline:
            left.append(row.name)
            continue
        started = time.monotonic()
        try:
            found = row.measure()
        except Exception as error:
            found = {"failure": f"{type(error).__name__}: {error}"[-2000:]}
        taken = round(time.monotonic() - started, 1)
        print(f"{row.name}: {taken} s {found.get('failure', '')}", file=sys.stderr, flush=True)
        keep({"name": row.name, "took_seconds": taken, **found})
    return left


def table(rows: Sequence[dict[str, Any]]) -> list[list[str]]:
    """What, how it compares with the dense way of the same row, and the bound of the issue."""
    found = []
    for row in rows:
        name = row["name"]
        if "failure" in row:
            found.append([name, "failed", row["failure"].splitlines()[0]])
        elif name.startswith("product"):
            for tokens, taken in row["seconds"].items():
                usual = taken.get("torch bf16", taken.get("dense"))
                for mode, seconds in taken.items():
                    microseconds = f"{1e6 * seconds:.1f} µs"
                    found.append(
                        [f"{name}, {tokens} tokens", mode, microseconds, f"{usual / seconds:.2f} ×"]
                    )
        elif name.startswith("model"):
            for mode, own in row.items():
                if isinstance(own, dict) and "token_seconds" in own:
                    usual = row[f"dense, {mode.split(', ')[1]}"]
                    faster = usual["token_seconds"] / own["token_seconds"]
                    prompt = usual["prompt_seconds"] / own["prompt_seconds"]
                    speed = f"{1 / own['token_seconds']:.1f} tokens/s"
                    found.append([name, mode, speed, f"{faster:.2f} ×, prompt {prompt:.2f} ×"])
        elif name.startswith("evaluate"):
            window = f"{1000 * row['window_seconds']:.0f} ms a window"
            found.append([name, f"{row['layers']} layers", window])
        else:
            found.append([name, *of_pruning(row)])
    return found


def of_pruning(row: dict[str, Any]) -> list[str]:
    """Minutes of a whole model, from its layers, and the peak of memory."""
    layers = sorted(row["seconds_of_layers"])
    around = row["seconds"] - sum(layers)
    whole = (around + row["whole_layers"] * layers[len(layers) // 2]) / 60
    kind = "measured" if row["layers"] == row["whole_layers"] else f"from {row['layers']} layers"
    bound = BOUNDS.get(row["name"].split()[1])
    peak = row["peak_cuda_bytes"]
    memory = "" if peak is None else f"{peak / 2**30:.1f} GiB"
    phases = sorted(row["seconds_of_phases"].items(), key=lambda phase: -phase[1])
    longest = ", ".join(f"{label} {seconds:.0f} s" for label, seconds in phases[:4])
    minutes = f"{whole:.1f} min" + (f" of {bound}" if bound else "")
    return [kind, minutes, memory, longest]


def scale_of(dry: bool) -> Any:
    """Llama-2-7B's shapes on a GPU, or tiny ones in Triton's interpreter."""
    from benchmarks.speed import gpu_rows as measure

    from secateur.timing import seconds_of

    if not dry:
        return measure.Scale(
            "cuda", ((4096, 4096), (11008, 4096), (4096, 11008)), (1, 2, 4, 8, 16),
            (1, 16, 64, 256, 1024, 4096), LLAMA_7B, 1024, 64, 5, "7b", 128, 2048, QWEN3_30B_A3B,
        )  # fmt: skip

    def clock(calls: Any) -> list[float]:
        return [seconds_of(call) for call in calls]

    return measure.Scale(
        "cpu", ((64, 128),), (1, 2), (1, 4), TINY, 4, 2, 1, "tiny", 4, 16, TINY_MIXTURE, clock
    )


def heading(dry: bool) -> str:
    """The GPU and the releases; no day, because rows of other days count."""
    import torch
    import transformers
    import triton

    gpu = "no GPU" if dry else torch.cuda.get_device_name()
    return (
        f"{gpu}; torch {torch.__version__}, triton {triton.__version__}, "
        f"transformers {transformers.__version__}"
    )


def clear(deadline: float, work: Path) -> None:
    """Give memory of the GPU back, for rows that have a process of their own.

    Where a failed row has made the GPU unusable for this process, another one goes on.
    """
    import torch

    gc.collect()
    try:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
    except RuntimeError:
        left = ["--minutes", str((deadline - time.monotonic()) / 60), "--work", str(work)]
        again = [sys.executable, "-m", "benchmarks.speed.gpu", *sys.argv[1:], *left]
        os.execv(sys.executable, [*again, "--past-failures"])


def main() -> None:
    """Measure what is missing, print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=9, help="of this call")
    parser.add_argument("--only", nargs="+", default=[""], help="beginnings of the names of rows")
    parser.add_argument("--work", type=Path, help="folder for checkpoints, kept; 30 GB")
    parser.add_argument("--layers", type=int, default=LAYERS)
    parser.add_argument("--few", type=int, default=4, help="layers for methods that take long")
    parser.add_argument("--dry", action="store_true", help="tiny shapes, on a CPU")
    parser.add_argument("--results", type=Path, help="folder of gpu.json")
    parser.add_argument("--table", action="store_true", help="measure nothing")
    parser.add_argument(
        "--past-failures", action="store_true", help="leave failed rows as they are"
    )
    args = parser.parse_args()
    deadline = time.monotonic() + 60 * args.minutes
    if args.dry:
        os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported
    if args.results is not None:
        stored.RESULTS = args.results
    if not args.table:
        protocol = {"protocol": __doc__}
        setup = heading(args.dry)
        found = stored.known_rows("gpu", protocol, setup)
        known = {row["name"] for row in found if "failure" not in row}
        if args.past_failures:
            known = {row["name"] for row in found}
        found = [row for row in found if row["name"] in known]

        with tempfile.TemporaryDirectory() as scratch:
            work = args.work or Path(scratch)

            def keep(row: dict[str, Any]) -> None:
                found.append(row)
                stored.write_rows("gpu", setup, protocol, found)
                if not args.dry:
                    clear(deadline, work)

            rows = rows_of(scale_of(args.dry), work, args.layers, args.few)
            rows = [row for row in rows if row.name.startswith(tuple(args.only))]
            left = measure_all(rows, known, deadline, keep)
        if left:
            print(f"{len(left)} rows are left: {', '.join(left)}", file=sys.stderr)
    for line in table(stored.known_rows("gpu")):
        print("| " + " | ".join(line) + " |")


if __name__ == "__main__":
    main()
