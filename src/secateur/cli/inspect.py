"""`secateur inspect`: what a model is made of, and where its zeros are."""

from __future__ import annotations

from typing import Annotated

from secateur.cli import options as o

__all__ = ["inspect"]


def inspect(
    model: Annotated[str, o.argument(help="Hub id, folder, GGUF file or named sample.")],
    *,
    layer: Annotated[
        int | None, o.option(help="List the linears of this decoder layer. [a line for each layer]")
    ] = None,
    zeros: Annotated[
        bool,
        o.option(
            "--zeros",
            help="Count the zeros of a GGUF file too. Without it only the header is read.",
        ),
    ] = False,
    trust_remote_code: o.TrustRemoteCode = False,
    as_json: o.Json = False,
) -> None:
    """Show family, sizes, linears and the sparsity really stored, layer by layer."""
    from secateur.cli.progress import show_progress
    from secateur.cli.rendering import print_result
    from secateur.workflows.judge.inspect import inspect as run_inspection

    with show_progress() as progress:
        result = run_inspection(
            model, layer=layer, zeros=zeros, trust_remote_code=trust_remote_code, progress=progress
        )
    print_result(result, as_json=as_json)
