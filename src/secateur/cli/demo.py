"""`secateur demo`: a real model, pruned, measured, heard and reported, without a hub."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from secateur.cli import options as o

if TYPE_CHECKING:
    from secateur.diagnostics.audit import Audit
    from secateur.reporting.results.evaluate import EvaluateResult

__all__ = ["demo"]

MODEL = "smollm2-135m"
CALIBRATION, JUDGING = "boolq-calibration", "boolq-held-out"
PROMPTS = (
    "The Eiffel Tower is a famous landmark in",
    "Once upon a time, in a village by the sea, there lived an old woman who",
)


def demo(
    *,
    output: Annotated[str, o.option("--output", "-o", help="Folder for it.")] = "demo-run",
    sparsity: Annotated[float, o.option(help="Fraction of zeros.")] = 0.5,
    effort: Annotated[str, o.option(help="Preset: fast, balanced or best.")] = "balanced",
    samples: Annotated[int, o.option(help="Calibration windows of 512 tokens.")] = 64,
    windows: Annotated[int, o.option(help="Windows of 512 tokens to judge on.")] = 40,
    as_json: o.Json = False,
) -> None:
    """Prune SmolLM2-135M, judge it beside the dense model on other text, and write a report."""
    from secateur.cli.progress import show_progress
    from secateur.cli.rendering import print_json, stderr
    from secateur.workflows.judge.evaluate import evaluate
    from secateur.workflows.judge.inspect import inspect_checkpoint
    from secateur.workflows.prune.checkpoint import prune
    from secateur.workflows.report import report as write_report

    folder = Path(output)
    with show_progress() as progress:
        stderr.print(f"[bold]1/3[/] pruning {MODEL} to {sparsity:.0%} ({effort})")
        report = prune(
            MODEL,
            output=folder,
            effort=effort,
            sparsity=sparsity,
            calibration=CALIBRATION,
            windows=samples,
            sequence_length=512,
            progress=progress,
            restart=True,
            overwrite=True,
        )
        stderr.print("[bold]2/3[/] judging the result beside the dense model")
        judged = evaluate(
            folder,
            dense=MODEL,
            text=JUDGING,
            generation=True,
            prompts=PROMPTS,
            sequence_length=512,
            windows=windows,
            progress=progress,
        )
        stderr.print("[bold]3/3[/] counting zeros and writing the report")
        dense, pruned = (
            inspect_checkpoint(name, None, False, progress).audit for name in (MODEL, str(folder))
        )
        page = write_report([folder], folder / "report.html").page
    if as_json:
        told = {"report": str(page), "evaluation": judged.to_json(), "manifest": report.manifest}
        print_json({**told, "dense": dense.to_json(), "pruned": pruned.to_json()})
        return
    show(dense, pruned, judged, report.manifest)
    show_texts(judged)
    show_places(folder, page)


def show(dense: Audit, pruned: Audit, judged: EvaluateResult, manifest: dict[str, Any]) -> None:
    """The comparison, for people."""
    from secateur.cli.rendering import stdout
    from secateur.reporting.tables import Table, gib, mib, print_blocks

    [text], cost = judged.texts, manifest["cost"]
    rows = [
        ("perplexity", f"{text.reference_perplexity:.2f}", f"{text.perplexity:.2f}"),
        ("zeros in decoder matrices", f"{dense.sparsity:.2%}", f"{pruned.sparsity:.2%}"),
        ("pruning time", "", f"{cost['seconds']:.0f} s"),
        ("peak memory while pruning", "", gib(cost["peak_resident_bytes"])),
        ("weight files", mib(dense.file_bytes), mib(pruned.file_bytes)),
    ]
    print_blocks([Table.of(MODEL, ("", "dense", "pruned"), rows)])
    protocol = ", ".join(f"{k} {v}" for k, v in text.protocol.items())
    stdout.print(f"perplexity protocol {text.protocol_id}: {protocol}", style="dim")


def show_texts(judged: EvaluateResult) -> None:
    """What both models make of the first prompt."""
    from secateur.cli.rendering import stdout

    first = judged.generation[0].samples[0]
    for name, text in (("dense", first.reference_text or ""), ("pruned", first.text)):
        stdout.print(f"\n[bold]{name} says:[/] ", end="")
        stdout.print(f"{first.prompt}{text}", markup=False)


def show_places(folder: Path, page: Path) -> None:
    """Where everything lies."""
    from secateur.cli.rendering import stdout

    stdout.print(
        "\nThe files are equally large: zeros are stored as zeros until they are packed.\n"
        f"The pruned model lies in [bold]{folder}[/]; its card is {folder / 'README.md'}.\n"
        f"The report is [bold]{page}[/]: open it in a browser."
    )
