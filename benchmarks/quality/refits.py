"""What pair swaps and refits bring to single matrices of SmolLM2-135M: errors and seconds.

    python -m benchmarks.quality.refits [--layers 2 15 27] [--samples 24]

Each matrix is taken by itself from the dense model. The error is ‖(W − Ŵ)X‖² / ‖WX‖², on the
calibration inputs (`boolq-calibration`) and on others (`boolq-held-out`), half as many windows;
the mean over the matrices. Masks: Wanda's, Wanda's after `swaps`, and the one SparseGPT chooses.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import torch
from benchmarks.hardware import heading, keep, markdown
from torch import Tensor, nn

from secateur.calibration.statistics.gram import Gram
from secateur.calibration.windows import WindowPlan, make_windows
from secateur.models.opening import load_whole
from secateur.models.samples import sample_text
from secateur.models.sources import resolve
from secateur.models.tokenizer import load_tokenizer
from secateur.sparsity.hessian import relative_output_error
from secateur.sparsity.patterns import parse_pattern
from secateur.sparsity.refinements.swaps import swaps
from secateur.sparsity.scores.wanda import wanda as wanda_score
from secateur.sparsity.solvers import solvers

MEASURES = ("src/secateur/sparsity/refinements", "src/secateur/sparsity/solvers")

LINEARS = ("self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj")
PATTERNS = (("unstructured", "row", 0.5), ("unstructured", "row", 0.7), ("2:4", None, 0.5))
REFITS = ("zero", "obs", "admm", "least-squares")


def timed(call: Callable[[], Any]) -> tuple[Any, float]:
    """What a call returns, and its seconds."""
    start = time.perf_counter()
    result = call()
    return result, time.perf_counter() - start


def grams_of(model: nn.Module, linears: dict[str, nn.Linear], windows: Tensor) -> dict[str, Tensor]:
    """The gram of each linear's inputs over the windows."""
    grams = {
        name: Gram((linear.out_features, linear.in_features)) for name, linear in linears.items()
    }
    hooks = [
        linear.register_forward_pre_hook(
            lambda _, inputs, gram=grams[name]: gram.update(inputs[0].flatten(0, 1))
        )
        for name, linear in linears.items()
    ]
    with torch.no_grad():
        for batch in windows.split(4):
            model(batch, use_cache=False)
    for hook in hooks:
        hook.remove()
    return {name: gram.value() for name, gram in grams.items()}


def measure(weight: Tensor, gram: Tensor, held_out: Tensor) -> list[dict[str, Any]]:
    """All masks and refits of one matrix."""
    statistics = {"gram": gram, "column_norm": gram.diagonal().sqrt()}
    score = wanda_score(weight, statistics)
    prepared = {name: solvers[name]().prepare(statistics) for name in REFITS}
    rows = []
    for text, scope, sparsity in PATTERNS:
        pattern = parse_pattern(text, scope)
        wanda = pattern.mask(score, sparsity)
        swapped, seconds = timed(
            lambda wanda=wanda, pattern=pattern, sparsity=sparsity: swaps(
                weight, wanda, statistics, pattern, sparsity
            )
        )
        chosen = solvers["obs"]().choose(weight, prepared["obs"], pattern, sparsity).mask
        for name, mask in (("wanda", wanda), ("swapped", swapped), ("sparsegpt", chosen)):
            for refit in REFITS:
                solution, solve_seconds = timed(
                    lambda refit=refit, mask=mask: solvers[refit]().solve(
                        weight, prepared[refit], mask
                    )
                )
                rows.append({
                    "shape": list(weight.shape), "pattern": text, "sparsity": sparsity,
                    "mask": name, "refit": refit,
                    "error": float(relative_output_error(weight, solution.weight, gram)),
                    "held_out_error": float(relative_output_error(weight, solution.weight, held_out)),
                    "swap_seconds": seconds if name == "swapped" else 0.0,
                    "swaps_per_row": float((wanda & ~mask).sum()) / len(mask),
                    "solve_seconds": solve_seconds,
                })  # fmt: skip
    return rows


def errors(rows: list[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Mean errors on calibration and held-out inputs, a line for each pattern and mask."""
    lines = []
    for text, _, sparsity in PATTERNS:
        for mask in ("wanda", "swapped", "sparsegpt"):
            cells = []
            for refit in REFITS:
                of = [
                    r for r in rows
                    if (r["pattern"], r["sparsity"], r["mask"], r["refit"])
                    == (text, sparsity, mask, refit)
                ]  # fmt: skip
                seen, unseen = (
                    sum(r[k] for r in of) / len(of) for k in ("error", "held_out_error")
                )
                cells.append(f"{seen:.4f} ({unseen:.4f})")
            lines.append([f"{text} {sparsity:.0%}", mask, *cells])
    return ["zeros", "mask", *REFITS], lines


TABLES = {"errors": errors}


def main() -> None:
    """Gather, measure, show."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--layers", type=int, nargs="*", default=[2, 15, 27])
    parser.add_argument("--samples", type=int, default=24)
    args = parser.parse_args()
    print(heading())
    folder = resolve(args.model).folder
    model, tokenizer = load_whole(folder, torch.device("cpu")), load_tokenizer(folder)
    names = [f"model.layers.{layer}.{linear}" for layer in args.layers for linear in LINEARS]
    linears = {name: model.get_submodule(name) for name in names}

    def gathered(text: str, samples: int) -> dict[str, Tensor]:
        plan = WindowPlan(windows=samples, sequence_length=512)
        return grams_of(model, linears, make_windows(sample_text(text), tokenizer, plan))

    grams = gathered("boolq-calibration", args.samples)
    held_out = gathered("boolq-held-out", args.samples // 2)
    rows = []
    for name in names:
        weight = linears[name].weight.detach()
        rows += [{"linear": name, **r} for r in measure(weight, grams[name], held_out[name])]
        print(name, flush=True)
    protocol = {"model": args.model, "samples": args.samples, "sequence_length": 512}
    print(f"written to {keep('refits', protocol, rows)}")
    print(markdown(*errors(rows)))


if __name__ == "__main__":
    main()
