"""`secateur chain`: several verbs one after the other, written in one file."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from secateur.cli.verb import command

if TYPE_CHECKING:
    from secateur.recipes.chain import ChainRecipe
    from secateur.workflows.chain import ChainReport

__all__ = ["chain"]


def run(recipe: ChainRecipe, **call: Any) -> ChainReport:
    """Run all steps with a bar of progress."""
    from secateur.cli.progress import show_progress
    from secateur.workflows.chain import run_chain

    with show_progress() as progress:
        return run_chain(recipe, progress, **call)


def show(report: ChainReport) -> None:
    """The account of what is left, for people."""
    from secateur.cli.rendering import mib, print_table

    first = report.links[0]
    rows = [
        (
            link.step,
            f"{link.parameters:,}",
            f"{link.kept:,}",
            f"{link.kept / first.kept:.1%}",
            mib(link.file_bytes),
            f"{link.file_bytes / first.file_bytes:.1%}",
            f"{link.seconds:.0f} s",
        )
        for link in report.links
    ]
    columns = ("after", "parameters", "not zero", "left", "weight files", "left", "time")
    print_table("chain", columns, rows)
    print_table("", ("", ""), [("output", str(report.output))])


chain = command("chain", run, show)
