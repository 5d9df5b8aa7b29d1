"""`secateur decompress`: back to a dense checkpoint that any engine loads."""

from __future__ import annotations

from typing import Annotated

import typer

from secateur.cli import options as o

__all__ = ["decompress"]


def decompress(
    model: Annotated[str, typer.Argument(help="Folder or hub id of a compressed checkpoint.")],
    output: Annotated[str, typer.Option("--output", "-o", help="Folder for the result.")],
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an existing output folder.")
    ] = False,
    as_json: o.Json = False,
) -> None:
    """Write a compressed model as plain dense safetensors again."""
    from secateur.cli.progress import show_progress
    from secateur.cli.rendering import print_result
    from secateur.workflows.compress.unpack import decompress as run_decompression

    with show_progress() as progress:
        report = run_decompression(model, output=output, overwrite=overwrite, progress=progress)
    print_result(report, as_json=as_json)
