"""`secateur decompress`: back to a dense checkpoint that any engine loads."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from secateur.cli.verb import command

if TYPE_CHECKING:
    from secateur.recipes.compress import DecompressRecipe
    from secateur.reporting.compression_report import DecompressionReport

__all__ = ["decompress"]


def run(recipe: DecompressRecipe, **call: Any) -> DecompressionReport:
    """Decompress with a bar of progress."""
    from secateur.cli.progress import show_progress
    from secateur.workflows.compress.unpack import decompress_recipe

    with show_progress() as progress:
        return decompress_recipe(recipe, progress, **call)


def show(report: DecompressionReport) -> None:
    """What became of it, for people."""
    from secateur.cli.rendering import mib, print_table

    rows = [
        ("weight files before", mib(report.source_bytes)),
        ("weight files now", mib(report.file_bytes)),
        ("matrices unpacked", str(report.matrices)),
        ("time", f"{report.seconds:.1f} s"),
        ("output", str(report.output)),
    ]
    print_table("decompressed", ("", ""), rows)


decompress = command("decompress", run, show)
