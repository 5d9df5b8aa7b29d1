"""`secateur compress`: a checkpoint without its zeros."""

from __future__ import annotations

from typing import Annotated

import typer

from secateur.cli import options as o

__all__ = ["compress"]


def compress(
    model: Annotated[str, typer.Argument(help="Folder, hub id, GGUF file or named sample.")],
    output: Annotated[str, typer.Option("--output", "-o", help="Folder for the result.")],
    format: Annotated[
        str,
        typer.Option(
            help="auto: the smallest for each matrix; or bitmask, n-of-m, dense. Dense is taken "
            "where packing does not pay."
        ),
    ] = "auto",
    values: Annotated[
        str,
        typer.Option(help="auto: as in the source, lossless; or bfloat16, float16, float32, int8."),
    ] = "auto",
    embeddings: Annotated[
        str, typer.Option(help="auto: as in the source; or int8, for embedding and head.")
    ] = "auto",
    archive: Annotated[
        bool, typer.Option("--archive", help="The smallest files; unpacked on loading.")
    ] = False,
    calibration: Annotated[
        str | None,
        typer.Option(
            help="Text by which int8 weights make up for each other's rounding: JSONL or text "
            "file, folder, hub data set, named text, or safetensors windows."
        ),
    ] = None,
    samples: o.Samples = None,
    sequence_length: o.SequenceLength = None,
    seed: o.Seed = None,
    packing: o.Packing = None,
    field: o.Field = None,
    memory_budget_gib: o.Budget = None,
    activations: o.ActivationsPlace = None,
    micro_batch_tokens: o.MicroBatch = None,
    device: o.Device = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with a stopped run that had --calibration.")
    ] = False,
    restart: Annotated[
        bool, typer.Option("--restart", help="Discard what such a run left.")
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an existing output folder.")
    ] = False,
    trust_remote_code: o.TrustRemoteCode = False,
    as_json: o.Json = False,
) -> None:
    """Store a pruned model without its zeros."""
    from secateur.cli.progress import show_progress
    from secateur.cli.rendering import print_result
    from secateur.workflows.compress.pack import compress as run_compression

    with show_progress() as progress:
        report = run_compression(
            model,
            output=output,
            format=format,
            values=values,
            embeddings=embeddings,
            archive=archive,
            calibration=calibration,
            resume=resume,
            restart=restart,
            overwrite=overwrite,
            trust_remote_code=trust_remote_code,
            progress=progress,
            samples=samples,
            sequence_length=sequence_length,
            seed=seed,
            packing=packing,
            field=field,
            budget_gib=memory_budget_gib,
            activations=activations,
            micro_batch_tokens=micro_batch_tokens,
            device=device,
        )
    print_result(report, as_json=as_json)
