"""`secateur plan`: what a run would need, without doing it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from secateur.cli.verb import command

if TYPE_CHECKING:
    from secateur.engine.plan import Plan
    from secateur.recipes.prune import PruneRecipe

__all__ = ["plan"]


def run(recipe: PruneRecipe, **_: Any) -> tuple[Plan, str]:
    """The plan, and where hidden states would wait."""
    from secateur.workflows.prune.checkpoint import plan_recipe

    return plan_recipe(recipe)


def to_json(planned: tuple[Plan, str]) -> dict[str, Any]:
    """All numbers of the plan."""
    found, where = planned
    return {**found.to_json(), "activations": where}


def show(planned: tuple[Plan, str]) -> None:
    """The plan, for people."""
    from secateur.cli.rendering import gib, mib, not_pruned, print_table

    found, where = planned
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


plan = command("plan", run, show, to_json, frozenset({"output", "overwrite", "resume", "restart"}))
