"""`secateur eval`: judge a model."""

from __future__ import annotations

from typing import Annotated

import typer

from secateur.cli import options as o

__all__ = ["evaluate"]


def evaluate(
    model: Annotated[str, typer.Argument(help="Hub id, folder, GGUF file or named sample.")],
    perplexity: Annotated[
        str,
        typer.Option(help="Text to judge on: file, named text, or hub data set. [wikitext2]"),
    ] = "wikitext2",
    sequence_length: o.SequenceLength = None,
    max_windows: Annotated[
        int | None, typer.Option(help="Judge on the first windows only.")
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    trust_remote_code: o.TrustRemoteCode = False,
    as_json: o.Json = False,
) -> None:
    """Measure perplexity, and print the protocol it was measured by."""
    from secateur.cli.rendering import ProgressBar, print_json, print_table
    from secateur.workflows import evaluate as run_evaluation

    with ProgressBar() as progress:
        result = run_evaluation(
            model,
            text=perplexity,
            sequence_length=sequence_length,
            max_windows=max_windows,
            device=device,
            trust_remote_code=trust_remote_code,
            progress=progress,
        )
    if as_json:
        print_json({"model": model, **result.to_json()})
        return
    rows = [
        ("perplexity", f"{result.perplexity:.4f}"),
        ("loss, nats per token", f"{result.mean_loss:.4f} ± {result.standard_error or 0:.4f}"),
        ("time", f"{result.seconds:.1f} s"),
        *((f"protocol: {key}", str(value)) for key, value in result.protocol.items()),
    ]
    print_table(model, ("", ""), rows, numbers=2)
