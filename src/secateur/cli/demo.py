"""`secateur demo`: a real model, pruned, measured and heard, without a hub."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Annotated, Any

import typer

from secateur.cli import options as o

__all__ = ["demo"]

MODEL = "smollm2-135m"
CALIBRATION, JUDGING = "boolq-calibration", "boolq-held-out"
PROMPT = "The Eiffel Tower is a famous landmark in"


def demo(
    output: Annotated[str, typer.Option("--output", "-o", help="Folder for it.")] = "demo-run",
    sparsity: Annotated[float, typer.Option(help="Fraction of zeros.")] = 0.5,
    effort: Annotated[str, typer.Option(help="Preset: fast, balanced or best.")] = "balanced",
    samples: Annotated[int, typer.Option(help="Calibration windows of 512 tokens.")] = 64,
    windows: Annotated[int, typer.Option(help="Windows of 512 tokens to judge on.")] = 40,
    as_json: o.Json = False,
) -> None:
    """Prune SmolLM2-135M and compare it with the dense model, on text it was not calibrated on."""
    from secateur.cli.rendering import ProgressBar, print_json, stderr
    from secateur.workflows import prune
    from secateur.workflows.evaluating import look_at

    folder = Path(output)
    if (folder / "secateur" / "manifest.json").exists():
        shutil.rmtree(folder)  # an earlier demo
    with ProgressBar() as progress:
        stderr.print(f"[bold]1/3[/] judging {MODEL} as it is")
        dense = look_at(MODEL, JUDGING, PROMPT, max_windows=windows, progress=progress)
        stderr.print(f"[bold]2/3[/] pruning to {sparsity:.0%} ({effort})")
        report = prune(
            MODEL,
            output=folder,
            effort=effort,
            sparsity=sparsity,
            calibration=CALIBRATION,
            samples=samples,
            sequence_length=512,
            progress=progress,
            restart=True,
        )
        stderr.print("[bold]3/3[/] judging the result")
        pruned = look_at(str(folder), JUDGING, PROMPT, max_windows=windows, progress=progress)
    if as_json:
        print_json(
            {"dense": dense.to_json(), "pruned": pruned.to_json(), "manifest": report.manifest}
        )
        return
    show(dense, pruned, report, folder)


def show(dense: Any, pruned: Any, report: Any, folder: Path) -> None:
    """The comparison, for people."""
    from secateur.cli.rendering import gib, mib, print_table, stdout

    cost, result = report.manifest["cost"], report.manifest["result"]
    files = mib(result["file_bytes"])
    rows = [
        ("perplexity", f"{dense.evaluation.perplexity:.2f}", f"{pruned.evaluation.perplexity:.2f}"),
        (
            "zeros in decoder matrices",
            f"{dense.audit.sparsity:.2%}",
            f"{pruned.audit.sparsity:.2%}",
        ),
        ("pruning time", "", f"{cost['seconds']:.0f} s"),
        ("peak memory while pruning", "", gib(cost["peak_resident_bytes"])),
        ("weight files", mib(dense.audit.file_bytes), files),
    ]
    print_table(MODEL, ("", "dense", "pruned"), rows)
    protocol = ", ".join(f"{k} {v}" for k, v in pruned.evaluation.protocol.items())
    stdout.print(f"perplexity protocol: {protocol}", style="dim")
    stdout.print("\n[bold]dense says:[/] ", end="")
    stdout.print(dense.sentence, markup=False)
    stdout.print("[bold]pruned says:[/] ", end="")
    stdout.print(pruned.sentence, markup=False)
    stdout.print(
        "\nThe files are equally large: zeros are stored as zeros until they are packed.\n"
        f"The pruned model lies in [bold]{folder}[/]; its card is {folder / 'README.md'}."
    )
