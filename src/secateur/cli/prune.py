"""`secateur prune`: the main job."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from secateur.cli.verb import command

if TYPE_CHECKING:
    from secateur.recipes.prune import PruneRecipe
    from secateur.reporting.prune_report import PruneReport

__all__ = ["prune"]


def run(recipe: PruneRecipe, **call: Any) -> PruneReport:
    """Prune with a bar of progress."""
    from secateur.cli.progress import show_progress
    from secateur.workflows.pruning import prune_recipe

    with show_progress() as progress:
        return prune_recipe(recipe, progress, **call)


def show(report: PruneReport) -> None:
    """What was done, for people."""
    from secateur.cli.compress import show as show_compression
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
    if report.compression is not None:
        show_compression(report.compression)


prune = command("prune", run, show)
