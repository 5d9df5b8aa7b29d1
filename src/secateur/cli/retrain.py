"""`secateur retrain`: let a pruned model learn, and keep its zeros."""

from __future__ import annotations

from secateur.cli import options as o
from secateur.cli import training_options as t

__all__ = ["retrain"]


def retrain(
    model: t.Student,
    output: t.Output = None,
    text: t.Text = None,
    minutes: t.Minutes = None,
    steps: t.Steps = None,
    epochs: t.Epochs = None,
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
    """Train a pruned model on text; what is zero stays zero at every step."""
    given = dict(locals())
    from secateur.recipes.training_schema import RetrainRecipe

    recipe = t.training_recipe(RetrainRecipe, given)
    t.run(recipe, resume=resume, restart=restart, overwrite=overwrite, as_json=as_json)
