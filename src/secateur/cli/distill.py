"""`secateur distill`: let a pruned or cut model learn from the one it was made from."""

from __future__ import annotations

from typing import Annotated

import typer

from secateur.cli import options as o
from secateur.cli import training_options as t

__all__ = ["distill"]


def distill(
    model: t.Student,
    output: t.Output = None,
    teacher: Annotated[
        str | None, typer.Option(help="Who is learned from. [the model that was pruned]")
    ] = None,
    text: t.Text = None,
    minutes: t.Minutes = None,
    steps: t.Steps = None,
    epochs: t.Epochs = None,
    kind: Annotated[
        str | None, typer.Option(help="forward, reverse or symmetric KL. [forward]")
    ] = None,
    temperature: Annotated[float | None, typer.Option(help="Of both models. [1]")] = None,
    next_token: Annotated[
        float | None, typer.Option(help="Share of the plain next-token loss. [0]")
    ] = None,
    hidden: Annotated[
        float | None, typer.Option(help="Weight of the loss of hidden states. [0]")
    ] = None,
    top_k: Annotated[
        int | None, typer.Option(help="Write the teacher's most likely tokens down first.")
    ] = None,
    teacher_file: Annotated[
        str | None, typer.Option(help="Where they are, or are to be. [removed at the end]")
    ] = None,
    windows: t.Windows = None,
    sequence_length: t.Length = None,
    batch: t.BatchSize = None,
    micro_batch: t.MicroBatch = None,
    learning_rate: t.Rate = None,
    optimizer: t.Optimizer = None,
    gradient_checkpointing: t.Checkpointing = False,
    mask: t.Mask = None,
    lora: t.Lora = None,
    gradual: t.Gradual = None,
    iterative: t.Iterative = None,
    validation: t.Validation = None,
    patience: t.Patience = None,
    tensorboard: t.Tensorboard = None,
    memory_budget_gib: t.Budget = None,
    seed: t.Seed = None,
    field: o.Field = None,
    device: o.Device = None,
    trust_remote_code: o.TrustRemoteCode = False,
    assignments: t.Set = None,
    resume: t.Resume = False,
    restart: t.Restart = False,
    overwrite: t.Overwrite = False,
    as_json: o.Json = False,
) -> None:
    """Let a pruned or cut model learn from a larger one; what is zero stays zero."""
    given = dict(locals())
    from secateur.recipes.training_schema import DistillRecipe

    recipe = t.training_recipe(DistillRecipe, given)
    t.run(recipe, resume=resume, restart=restart, overwrite=overwrite, as_json=as_json)
