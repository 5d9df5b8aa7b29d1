"""`secateur report`: one page about pruned models, for people."""

from __future__ import annotations

from typing import Annotated

from secateur.cli import options as o

__all__ = ["report"]


def report(
    runs: Annotated[
        list[str], o.argument(help="Run folders, compressed or not, and folders of sweeps.")
    ],
    *,
    output: Annotated[
        str, o.option("--output", "-o", help="The HTML file to write.")
    ] = "report.html",
    plots: Annotated[
        bool, o.option("--plots", help="Also every chart as PNG and SVG, beside the page.")
    ] = False,
    card: Annotated[
        str | None,
        o.option(help="Also a Markdown model card of the only run, with all that was measured."),
    ] = None,
    as_json: o.Json = False,
) -> None:
    """Put what was measured of pruned models on one self-contained page, side by side."""
    from secateur.cli.rendering import print_json, stdout
    from secateur.workflows.report import report as write_report

    files = write_report(runs, output, plots=plots, card=card)
    if as_json:
        told = {"page": str(files.page), "plots": [str(file) for file in files.plots]}
        print_json({**told, "card": str(files.card) if files.card else None})
        return
    stdout.print(f"report: [bold]{files.page}[/]")
    if files.plots:
        stdout.print(f"plots: {len(files.plots)} files in {files.plots[0].parent}")
    if files.card:
        stdout.print(f"model card: {files.card}")
