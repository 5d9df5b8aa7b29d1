"""`secateur inspect`: what a model is made of, and where its zeros are."""

from __future__ import annotations

from typing import Annotated, Any

from secateur.cli import options as o
from secateur.errors import RecipeError

__all__ = ["inspect"]


def inspect(
    model: Annotated[str, o.argument(help="Hub id, folder, GGUF file or named sample.")],
    *,
    layer: Annotated[int, o.option(help="List the linears of this decoder layer; -1 for all.")] = 0,
    trust_remote_code: o.TrustRemoteCode = False,
    as_json: o.Json = False,
) -> None:
    """Show family, sizes, linears and the sparsity really stored, layer by layer."""
    from secateur.cli.rendering import mib, not_pruned, print_json, print_table
    from secateur.workflows.judge.inspect import inspect_model

    audit = inspect_model(model, trust_remote_code=trust_remote_code)
    if layer >= audit.num_hidden_layers:
        raise RecipeError(
            f"there is no decoder layer {layer}: the model has {audit.num_hidden_layers}",
            where="--layer",
            remedy=f"use a number from 0 to {audit.num_hidden_layers - 1}, or -1 for all",
        )
    if as_json:
        print_json({"model": model, **audit.to_json()})
        return
    rows = [
        ("family", audit.family),
        ("decoder layers", str(audit.num_hidden_layers)),
        ("parameters", f"{audit.parameters:,}"),
        ("weight files", mib(audit.file_bytes)),
        ("stored as", ", ".join(f"{k} ({mib(v)})" for k, v in audit.dtypes.items())),
        ("zeros in decoder matrices", f"{audit.sparsity:.4%}"),
        ("zeros in all parameters", f"{audit.model_sparsity:.4%}"),
        ("cannot be pruned", not_pruned(audit.left)),
    ]
    if audit.compressed:
        rows.insert(4, ("compressed", audit.compressed))
    print_table(model, ("", ""), rows, numbers=2)
    shown = [x for x in audit.linears if layer < 0 or layer_of(x.name) == layer]
    print_table(
        "linears" if layer < 0 else f"linears of decoder layer {layer}",
        ("name", "out", "in", "zeros", *(("stored as",) if audit.compressed else ())),
        [
            (
                x.name,
                str(x.shape[0]),
                str(x.shape[1]),
                f"{x.sparsity:.4%}",
                *((stored_as(x.layout),) if audit.compressed else ()),
            )
            for x in shown
        ],
    )


def layer_of(name: str) -> int:
    """The number of a linear's decoder layer: the first in its name, experts have one behind it."""
    return next((int(part) for part in name.split(".") if part.isdigit()), -1)


def stored_as(layout: dict[str, Any] | None) -> str:
    """A layout in two words."""
    if layout is None:
        return "as it is"
    return f"{layout.get('pattern', layout['format'])} {layout['values']}"
