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
    method: o.Method = None,
    sparsity: o.Sparsity = None,
    pattern: o.PatternText = None,
    scope: o.Scope = None,
    score: o.ScoreName = None,
    solver: o.SolverName = None,
    include: o.Include = None,
    exclude: o.Exclude = None,
    override: o.Override = None,
    sequential: o.Sequential = None,
    calibration: o.CalibrationSource = None,
    samples: o.Samples = None,
    sequence_length: o.SequenceLength = None,
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
    recipe = o.recipe_from(
        model,
        assignments,
        output=output,
        method=method,
        sparsity=sparsity,
        pattern=pattern,
        scope=scope,
        score=score,
        solver=solver,
        include=include,
        exclude=exclude,
        overrides=override,
        sequential=sequential,
        source=calibration,
        samples=samples,
        sequence_length=sequence_length,
        seed=seed,
        packing=packing,
        field=field,
        budget_gib=memory_budget_gib,
        activations=activations,
        micro_batch_tokens=micro_batch_tokens,
        device=device,
        dtype=dtype,
        trust_remote_code=trust_remote_code,
    )
    from secateur.cli.rendering import ProgressBar, gib, mib, print_json, print_table
    from secateur.workflows import run_recipe

    with ProgressBar() as progress:
        report = run_recipe(recipe, progress, resume=resume, restart=restart, overwrite=overwrite)
    if as_json:
        print_json({"output": str(report.output), **report.manifest})
        return
    result, cost = report.manifest["result"], report.manifest["cost"]
    rows = [
        ("method", f"{report.manifest['method']['name']}, {report.manifest['method']['pattern']}"),
        ("zeros in decoder matrices", f"{result['decoder_sparsity']:.4%}"),
        ("zeros in all parameters", f"{result['model_sparsity']:.4%}"),
        ("time", f"{cost['seconds']:.1f} s"),
        ("peak memory", gib(cost["peak_resident_bytes"])),
        ("planned memory", gib(report.manifest["plan"]["peak_bytes"])),
        ("weight files", mib(result["file_bytes"])),
        ("output", str(report.output)),
    ]
    print_table("pruned", ("", ""), rows, numbers=2)
