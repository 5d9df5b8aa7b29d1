"""`secateur diagnose`: is the model sound, and is it what it claims to be?"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from secateur.cli import options as o
from secateur.errors import RecipeError

if TYPE_CHECKING:
    from secateur.diagnostics.diagnosis import Diagnosis
    from secateur.diagnostics.target import Target

__all__ = ["diagnose"]

STYLES = {"error": "bold red", "warning": "yellow", "note": "dim"}


def diagnose(
    model: Annotated[
        str | None,
        typer.Argument(help="Folder, compressed or not; hub id, GGUF file or named sample."),
    ] = None,
    dense: Annotated[
        str | None, typer.Option(help="The dense model: its layers are compared, one by one.")
    ] = None,
    text: Annotated[
        str, typer.Option(help="What both read: a text, or a safetensors file of windows.")
    ] = "boolq-held-out",
    windows: Annotated[int, typer.Option(help="Windows of that text.")] = 8,
    sequence_length: Annotated[
        int | None, typer.Option(help="Tokens per window. [256, or the model's length]")
    ] = None,
    training_log: Annotated[
        str | None,
        typer.Option(help="Log of a retraining: JSON lines with step, loss, learning_rate."),
    ] = None,
    target: Annotated[
        bool, typer.Option("--target", help="Only say what this machine can speed up.")
    ] = False,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    trust_remote_code: o.TrustRemoteCode = False,
    as_json: o.Json = False,
) -> None:
    """Check zeros, values, units and layers; exit code 3 if something is proven wrong."""
    from secateur.cli.progress import show_progress
    from secateur.cli.rendering import print_json
    from secateur.workflows.judge.diagnose import check_target
    from secateur.workflows.judge.diagnose import diagnose as run_diagnosis

    if target:
        machine = check_target()
        if as_json:
            print_json(machine.to_json())
        else:
            show_target(machine)
        return
    if model is None:
        raise RecipeError(
            "no model to diagnose", remedy="secateur diagnose DIR, or secateur diagnose --target"
        )
    with show_progress() as progress:
        found = run_diagnosis(
            model,
            dense=dense,
            text=text,
            windows=windows,
            sequence_length=sequence_length,
            training_log=training_log,
            device=device,
            trust_remote_code=trust_remote_code,
            progress=progress,
        )
    if as_json:
        print_json(found.to_json())
    else:
        show(found)
    if found.count("error"):
        raise typer.Exit(3)


def show(found: Diagnosis) -> None:
    """The verdict in a line; then what was found, for people."""
    from secateur.cli.rendering import print_table, stdout

    stdout.print(f"{found.model}: {found.verdict}", highlight=False, markup=False, soft_wrap=True)
    rows = [
        (
            f"[{STYLES[x.severity]}]{x.severity}[/]\n{x.id}",
            f"[bold]{plain(x.where)}[/]\n{plain(x.evidence)}\n[dim]→ {plain(x.remedy)}[/]",
        )
        for x in found.findings
    ]
    if rows:
        print_table("findings", ("what", "where, evidence → remedy"), rows, numbers=2)


def show_target(target: Target) -> None:
    """What this machine can speed up, for people."""
    from secateur.cli.rendering import print_table, stdout

    told = {True: "yes", False: "no", None: "depends"}
    rows = [(s.kind, s.engine, told[s.faster], plain(s.reason)) for s in target.supports]
    print_table(target.cpu, ("kind", "engine", "faster", "why"), rows, numbers=4)
    stdout.print(f"processor features: {', '.join(target.features) or 'not known'}")
    stdout.print(f"CUDA capability: {target.cuda_capability or 'no CUDA device'}")


def plain(text: str) -> str:
    """Text whose brackets are no markup."""
    from rich.markup import escape

    return escape(text)
