"""`secateur compress`: a checkpoint without its zeros."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from secateur.cli.verb import command

if TYPE_CHECKING:
    from secateur.recipes.compress import CompressRecipe
    from secateur.reporting.compression_report import CompressionReport

__all__ = ["compress"]


def run(recipe: CompressRecipe, **call: Any) -> CompressionReport:
    """Compress with a bar of progress."""
    from secateur.cli.progress import show_progress
    from secateur.workflows.compress.pack import compress_recipe

    with show_progress() as progress:
        return compress_recipe(recipe, progress, **call)


def show(report: CompressionReport) -> None:
    """What became of it, for people."""
    from secateur.cli.rendering import mib, print_table

    linears = report.linears
    rows = [
        ("weight files before", mib(report.source_bytes), ""),
        ("as dense bfloat16", mib(report.bfloat16_bytes), "100 %"),
        ("weight files now", mib(report.file_bytes), f"{report.ratio:.2%}"),
        ("of them linears", mib(linears.bytes), f"{linears.of_bfloat16:.2%}"),
    ]
    print_table("compressed", ("", "size", "of bfloat16"), rows)
    stored = [*report.formats.items()]
    if report.embeddings.matrices:
        stored.append(("embeddings int8", report.embeddings))
    print_table(
        f"stored as ({report.sparsity:.2%} zeros in the linears)",
        ("format", "matrices", "size", "bits per weight", "of bfloat16"),
        [
            (
                kind,
                str(x.matrices),
                mib(x.bytes),
                f"{x.bits_per_weight:.3f}",
                f"{x.of_bfloat16:.2%}",
            )
            for kind, x in stored
        ],
    )
    closing = [("time", f"{report.seconds:.1f} s"), ("output", str(report.output))]
    if report.rounding:
        error = f"{report.rounding['mean_error']:.2g} of the linears' outputs, squared"
        closing.insert(0, ("error of rounding", error))
    print_table("", ("", ""), closing)


compress = command("compress", run, show)
