"""`secateur structure`: fewer layers, heads, neurons, channels or experts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from secateur.cli.verb import command

if TYPE_CHECKING:
    from secateur.recipes.structure import StructureRecipe
    from secateur.workflows.structure.checkpoint import StructureReport

__all__ = ["structure"]


def run(recipe: StructureRecipe, **call: Any) -> StructureReport:
    """Cut with a bar of progress."""
    from secateur.cli.progress import show_progress
    from secateur.workflows.structure.checkpoint import structure_recipe

    with show_progress() as progress:
        return structure_recipe(recipe, progress, **call)


def to_json(report: StructureReport) -> dict[str, Any]:
    """The manifest, and where the result is."""
    return {"output": str(report.output), **report.manifest}


def show(report: StructureReport) -> None:
    """What went, for people."""
    from secateur.cli.rendering import gib, mib, print_table

    told, cost = report.manifest["structure"], report.manifest["cost"]
    before, after = told["before"], told["after"]

    def line(what: str, key: str) -> tuple[str, str, str, str]:
        return what, f"{before[key]:,}", f"{after[key]:,}", f"{share(before[key], after[key]):.1%}"

    rows = [
        line("parameters", "parameters"),
        line("decoder layers'", "decoder"),
        line("attention", "attention"),
        line("feed-forward", "ffn"),
        line("KV cache, bytes per token", "kv_cache_bytes_per_token"),
    ]
    if before["experts"]:
        rows.insert(4, line("experts", "experts"))
    size = share(before["file_bytes"], after["file_bytes"])
    rows.append(
        ("weight files", mib(before["file_bytes"]), mib(after["file_bytes"]), f"{size:.1%}")
    )
    if told["latency"]:
        now, then = (told["latency"][f"milliseconds_{when}"] for when in ("before", "after"))
        rows.append(
            ("time per token, timed", f"{now:.2f} ms", f"{then:.2f} ms", f"{then / now:.1%}")
        )
    print_table("cut", ("", "before", "after", "left"), rows)
    steps = [(f"{x['step']}, by {x['by']}", f"{step_share(x):.1%} left") for x in told["steps"]]
    loads = "secateur, or trust_remote_code" if told["varied"] else "plain transformers"
    rest: list[tuple[str, Any]] = [
        ("loads with", loads),
        ("time", f"{cost['seconds']:.1f} s"),
        ("peak memory", gib(cost["peak_resident_bytes"])),
        ("output", str(report.output)),
    ]
    print_table("steps", ("", "decoder"), [*steps, *rest], numbers=2)


def share(before: int, after: int) -> float:
    """What is left of a number."""
    return after / before if before else 1.0


def step_share(step: dict[str, Any]) -> float:
    """What a step left of the decoder it got."""
    return share(step["decoder_before"], step["decoder_after"])


structure = command("structure", run, show, to_json)
