"""`secateur prune`: the main job."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from secateur.cli import options as o

if TYPE_CHECKING:
    from secateur.reporting.prune_report import PruneReport

__all__ = ["prune"]


def prune(
    model: o.ModelArgument,
    output: Annotated[
        str | None, typer.Option("--output", "-o", help="Folder for the pruned model.")
    ] = None,
    effort: o.Effort = None,
    method: o.Method = None,
    sparsity: o.Sparsity = None,
    pattern: o.PatternText = None,
    scope: o.Scope = None,
    allocation: o.Allocation = None,
    score: o.ScoreName = None,
    solver: o.SolverName = None,
    refine: o.Refine = None,
    asymmetric: o.Asymmetric = None,
    fast_matmuls: o.FastMatmuls = None,
    passes: o.Passes = None,
    learning_rate: o.LearningRate = None,
    epochs: o.Epochs = None,
    include: o.Include = None,
    exclude: o.Exclude = None,
    override: o.Override = None,
    sequential: o.Sequential = None,
    on_collapse: o.OnCollapse = None,
    calibration: o.CalibrationSource = None,
    samples: o.Samples = None,
    sequence_length: o.SequenceLength = None,
    generated: o.Generated = None,
    seed: o.Seed = None,
    packing: o.Packing = None,
    field: o.Field = None,
    memory_budget_gib: o.Budget = None,
    activations: o.ActivationsPlace = None,
    micro_batch_tokens: o.MicroBatch = None,
    device: o.Device = None,
    dtype: o.Dtype = None,
    trust_remote_code: o.TrustRemoteCode = False,
    assignments: o.Set = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with a stopped run.")] = False,
    restart: Annotated[
        bool, typer.Option("--restart", help="Discard what a stopped run left.")
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an existing output folder.")
    ] = False,
    as_json: o.Json = False,
) -> None:
    """Prune a model into a new folder that plain transformers loads."""
    recipe = o.recipe_from(locals())
    from secateur.cli.progress import show_progress
    from secateur.cli.rendering import print_json
    from secateur.workflows.prune.checkpoint import run_recipe

    with show_progress() as progress:
        report = run_recipe(recipe, progress, resume=resume, restart=restart, overwrite=overwrite)
    if as_json:
        print_json({"output": str(report.output), **report.manifest})
        return
    show(report)


def show(report: PruneReport) -> None:
    """What was done, for people."""
    from secateur.cli.rendering import gib, mib, not_pruned, print_table

    result, cost = report.manifest["result"], report.manifest["cost"]
    rows = [
        ("method", f"{report.manifest['method']['name']}, {report.manifest['method']['pattern']}"),
        ("allocation", report.manifest["allocation"]["name"]),
        ("zeros in decoder matrices", f"{result['decoder_sparsity']:.4%}"),
        ("zeros in all parameters", f"{result['model_sparsity']:.4%}"),
        ("not pruned", not_pruned(report.left)),
        ("time", f"{cost['seconds']:.1f} s"),
        ("peak memory", gib(cost["peak_resident_bytes"])),
        ("planned memory", gib(report.manifest["plan"]["host_peak_bytes"])),
        ("weight files", mib(result["file_bytes"])),
        ("output", str(report.output)),
    ]
    if report.manifest["collapsed"]:
        rows.insert(-1, ("collapsed", ", ".join(report.manifest["collapsed"])))
    print_table("pruned", ("", ""), rows, numbers=2)
