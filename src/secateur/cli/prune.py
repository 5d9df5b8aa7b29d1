"""`secateur prune`: the main job."""

from __future__ import annotations

from typing import Annotated

import typer

from secateur.cli import options as o

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
    from secateur.cli.rendering import print_result
    from secateur.workflows.prune.checkpoint import run_recipe

    with show_progress() as progress:
        report = run_recipe(recipe, progress, resume=resume, restart=restart, overwrite=overwrite)
    print_result(report, as_json=as_json)
