"""`secateur plan`: what a run would need, without doing it."""

from __future__ import annotations

from secateur.cli import options as o

__all__ = ["plan"]


def plan(
    model: o.ModelArgument,
    effort: o.Effort = None,
    method: o.Method = None,
    sparsity: o.Sparsity = None,
    pattern: o.PatternText = None,
    scope: o.Scope = None,
    allocation: o.Allocation = None,
    epochs: o.Epochs = None,
    sequential: o.Sequential = None,
    calibration: o.CalibrationSource = None,
    samples: o.Samples = None,
    generated: o.Generated = None,
    sequence_length: o.SequenceLength = None,
    memory_budget_gib: o.Budget = None,
    activations: o.ActivationsPlace = None,
    micro_batch_tokens: o.MicroBatch = None,
    device: o.Device = None,
    trust_remote_code: o.TrustRemoteCode = False,
    assignments: o.Set = None,
    as_json: o.Json = False,
) -> None:
    """Tell what pruning would need: memory, disk, work. Reads no weights and writes nothing."""
    recipe = o.recipe_from(locals())
    from secateur.cli.rendering import print_result
    from secateur.workflows.prune.checkpoint import plan_recipe

    print_result(plan_recipe(recipe), as_json=as_json)
