"""`secateur structure`: fewer layers, heads, neurons, channels or experts."""

from __future__ import annotations

from typing import Annotated

import typer

from secateur.cli import options as o
from secateur.errors import RecipeError

__all__ = ["structure"]

COUNTS = ("keep_layers", "ffn", "heads", "query_heads", "hidden", "experts")
"""Options that are a number of units, or a fraction of them."""


def structure(
    model: o.ModelArgument,
    output: Annotated[
        str | None, typer.Option("--output", "-o", help="Folder for the smaller model.")
    ] = None,
    effort: o.Effort = None,
    keep_layers: Annotated[
        str | None,
        typer.Option(help="Decoder layers that stay: a number, or a fraction such as 0.8."),
    ] = None,
    ffn: Annotated[
        str | None, typer.Option(help="FFN neurons of each layer that stay, likewise.")
    ] = None,
    heads: Annotated[
        str | None,
        typer.Option(help="KV groups of each layer, with their query heads, that stay, likewise."),
    ] = None,
    query_heads: Annotated[
        str | None,
        typer.Option(help="Query heads of each KV group that stay, likewise; the cache stays."),
    ] = None,
    hidden: Annotated[
        str | None, typer.Option(help="Channels of the residual stream that stay, likewise.")
    ] = None,
    experts: Annotated[
        str | None, typer.Option(help="Experts of each layer that stay, likewise.")
    ] = None,
    keep_parameters: Annotated[
        float | None,
        typer.Option(
            "--parameters",
            help="Fraction of the decoder's parameters that stays; heads and neurons are cut.",
        ),
    ] = None,
    file_mib: Annotated[
        float | None, typer.Option(help="MiB of weights that may stay, likewise.")
    ] = None,
    decode_latency: Annotated[
        float | None,
        typer.Option(
            help="Fraction of the time per token that may stay, measured on this machine in "
            "transformers at batch 1, likewise."
        ),
    ] = None,
    kv_cache: Annotated[
        float | None, typer.Option(help="Fraction of the KV cache that stays; heads are cut.")
    ] = None,
    by: Annotated[
        str | None,
        typer.Option(
            "--depth-by",
            help="How layers are chosen: influence, angular, greedy, search. [influence]",
        ),
    ] = None,
    units: Annotated[
        str | None,
        typer.Option(
            "--depth-units",
            help="What goes: layers, or blocks (attention and FFN by themselves). [layers]",
        ),
    ] = None,
    allocation: o.Allocation = None,
    whole_first: Annotated[
        int | None,
        typer.Option(help="Layers at the start that keep all heads and neurons. [0]"),
    ] = None,
    whole_last: Annotated[
        int | None, typer.Option(help="Layers at the end that keep them, likewise. [0]")
    ] = None,
    multiple: Annotated[
        int | None, typer.Option(help="FFN neurons are kept in multiples of this. [1]")
    ] = None,
    pad: Annotated[
        bool, typer.Option("--pad", help="Pad layers to one size, for engines that need it.")
    ] = False,
    score: o.ScoreName = None,
    solver: o.SolverName = None,
    asymmetric: o.Asymmetric = None,
    fast_matmuls: o.FastMatmuls = None,
    epochs: o.Epochs = None,
    calibration: o.CalibrationSource = None,
    samples: o.Samples = None,
    sequence_length: o.SequenceLength = None,
    generated: o.Generated = None,
    seed: o.Seed = None,
    packing: o.Packing = None,
    field: o.Field = None,
    memory_budget_gib: o.Budget = None,
    activations: o.ActivationsPlace = None,
    micro_batch_tokens: o.MicroBatch = None,
    device: o.Device = None,
    dtype: o.Dtype = None,
    trust_remote_code: o.TrustRemoteCode = False,
    assignments: o.Set = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with a stopped run.")] = False,
    restart: Annotated[
        bool, typer.Option("--restart", help="Discard what a stopped run left.")
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an existing output folder.")
    ] = False,
    as_json: o.Json = False,
) -> None:
    """Cut structure out of a model: what is left is smaller and faster in every engine."""
    given = dict(locals())
    for name in COUNTS:
        given[name] = number(name, given[name])
    given["pad"] = pad or None
    from secateur.cli.progress import show_progress
    from secateur.cli.rendering import print_result
    from secateur.recipes.reading import build_structure_recipe
    from secateur.workflows.structure.checkpoint import structure_recipe

    recipe = build_structure_recipe(*o.values_from(given))
    with show_progress() as progress:
        report = structure_recipe(
            recipe, progress, resume=resume, restart=restart, overwrite=overwrite
        )
    print_result(report, as_json=as_json)


def number(name: str, text: str | None) -> int | float | None:
    """A number of units, or (with a point) a fraction of them.

    Raises:
        RecipeError: it is neither.
    """
    if text is None:
        return None
    try:
        return float(text) if "." in text else int(text)
    except ValueError:
        raise RecipeError(
            f"--{name.replace('_', '-')} {text!r} is no number",
            remedy="give a number of units such as 24, or a fraction such as 0.75",
        ) from None
