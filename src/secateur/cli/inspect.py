"""`secateur inspect`: what a model is made of, and where its zeros are."""

from __future__ import annotations

from typing import Annotated

from secateur.cli import options as o

__all__ = ["inspect"]


def inspect(
    model: Annotated[str, o.argument(help="Hub id, folder, GGUF file or named sample.")],
    *,
    layer: Annotated[int, o.option(help="List the linears of this decoder layer; -1 for all.")] = 0,
    trust_remote_code: o.TrustRemoteCode = False,
    as_json: o.Json = False,
) -> None:
    """Show family, sizes, linears and the sparsity really stored, layer by layer."""
    from secateur.cli.rendering import print_result
    from secateur.workflows.judge.inspect import inspect as run_inspection

    result = run_inspection(model, layer=layer, trust_remote_code=trust_remote_code)
    print_result(result, as_json=as_json)
