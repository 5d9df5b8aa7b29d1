"""`secateur retrain`: let a pruned model learn, and keep its zeros."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from secateur.cli.verb import command

if TYPE_CHECKING:
    from secateur.recipes.train import RetrainRecipe
    from secateur.reporting.training_report import TrainingReport

__all__ = ["retrain", "run", "show", "to_json"]


def run(recipe: RetrainRecipe, **call: Any) -> TrainingReport | None:
    """Train with a bar of progress; of several processes, only the first one reports."""
    from secateur.cli.progress import show_progress
    from secateur.workflows.train.checkpoint import run_training

    if int(os.environ.get("RANK", "0")):
        run_training(recipe, **call)
        return None
    with show_progress() as progress:
        return run_training(recipe, progress, **call)


def to_json(report: TrainingReport) -> dict[str, Any]:
    """The manifest, and where the result is."""
    return {"output": str(report.output), **report.manifest}


def show(report: TrainingReport) -> None:
    """What was done, for people."""
    from secateur.cli.rendering import gib, print_table

    result, cost = report.manifest["result"], report.manifest["cost"]
    seconds = cost["training_seconds"]
    rows = [
        ("objective", report.manifest["objective"]),
        ("zeros in decoder matrices", f"{report.sparsity:.4%}"),
        ("read", f"{report.tokens:,} tokens in {report.steps:,} steps"),
        ("time", f"{seconds:.1f} s, {report.tokens / seconds:,.0f} tokens/s"),
        ("peak memory", gib(cost["peak_resident_bytes"])),
        ("output", str(report.output)),
    ]
    if report.perplexity_after is not None:
        told = f"{report.perplexity_before:.3f} → {report.perplexity_after:.3f}"
        rows.insert(2, ("validation perplexity", f"{told} at step {result['best_step']}"))
    print_table("trained", ("", ""), rows, numbers=2)


retrain = command("retrain", run, show, to_json)
