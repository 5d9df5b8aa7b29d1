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
    from secateur.cli.rendering import gib, mib, not_pruned, print_json, print_table
    from secateur.workflows.prune.checkpoint import plan_recipe

    found, where = plan_recipe(recipe)
    if as_json:
        print_json({**found.to_json(), "activations": where})
        return
    out, columns = found.solve_shape
    rows = [
        ("decoder layers", f"{found.num_hidden_layers}"),
        ("weights that can be pruned", f"{found.prunable_weights:,}"),
        ("not pruned", not_pruned(found.left)),
        ("calibration tokens", f"{found.calibration_tokens:,}"),
        ("work", f"{found.flops / 1e12:.1f} TFLOP"),
        ("disk", gib(found.disk_bytes)),
        ("memory: the program itself", mib(found.process_bytes)),
        ("memory: one decoder layer", mib(found.layer_bytes)),
        (f"memory: hidden states (in {where})", mib(found.activation_bytes)),
        ("memory: forwards", mib(found.forward_bytes + found.waiting_bytes)),
        ("memory: statistics and solver", mib(found.solve_bytes)),
        *([("  the linear that takes most", f"{out} x {columns}")] if out else []),
        *(
            (f"memory: the whole model, {what}", mib(size))
            for what, size in (
                ("writing windows", found.writing_bytes),
                ("distilled", found.distilling_bytes),
            )
            if size
        ),
        ("peak memory of the GPU" if found.on_gpu else "peak memory", gib(found.peak_bytes)),
        *([("peak memory of the host", gib(found.host_peak_bytes))] if found.on_gpu else []),
    ]
    print_table("plan", ("", ""), rows)
