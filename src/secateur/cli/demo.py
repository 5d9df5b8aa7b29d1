"""`secateur demo`: prune, pack, time, evaluate and report a real model, without a hub."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from secateur.cli import options as o

if TYPE_CHECKING:
    from secateur.progress import Progress
    from secateur.reporting.results.demo import DemoResult

__all__ = ["demo"]

MODEL = "smollm2-135m"
CALIBRATION, JUDGING = "boolq-calibration", "boolq-held-out"
CONTENDERS = ("packed", "dense int8", "dense bf16", "torch bf16")
"""The timed contenders: the packed model, our kernels on dense weights, and torch."""
PROMPTS = (
    "The Eiffel Tower is a famous landmark in",
    "Once upon a time, in a village by the sea, there lived an old woman who",
)


def demo(
    *,
    output: Annotated[str, o.option("--output", "-o", help="Folder for it.")] = "demo-run",
    sparsity: Annotated[float, o.option(help="Fraction of zeros.")] = 0.5,
    effort: Annotated[str, o.option(help="Preset: fast, balanced or best.")] = "balanced",
    windows: Annotated[int, o.option(help="Calibration windows of 512 tokens.")] = 20,
    judged_windows: Annotated[int, o.option(help="Windows of 512 tokens to judge on.")] = 8,
    as_json: o.Json = False,
) -> None:
    """Prune SmolLM2-135M, pack, time and evaluate it beside the dense model; write a report."""
    from secateur.cli.progress import show_progress
    from secateur.cli.rendering import print_result

    with show_progress() as progress:
        result = carry_out(Path(output), sparsity, effort, windows, judged_windows, progress)
    print_result(result, as_json=as_json)


def carry_out(
    folder: Path,
    sparsity: float,
    effort: str,
    windows: int,
    judged_windows: int,
    listener: Progress,
) -> DemoResult:
    """Run the three steps, then write the report."""
    from secateur.progress import Labelled
    from secateur.reporting.results.demo import DemoResult
    from secateur.workflows.judge.bench import bench
    from secateur.workflows.judge.evaluate import evaluate
    from secateur.workflows.prune_and_pack import prune
    from secateur.workflows.report import report

    pruned = prune(
        MODEL,
        output=folder,
        effort=effort,
        sparsity=sparsity,
        calibration=CALIBRATION,
        windows=windows,
        sequence_length=512,
        compress="int8",
        compress_embeddings="int8",
        progress=Labelled(listener, "1 of 3, prune and pack"),
        restart=True,
        overwrite=True,
    )
    timed = bench(
        folder,
        contenders=CONTENDERS,
        prompt_tokens=16,
        new_tokens=32,
        rounds=3,
        progress=Labelled(listener, "2 of 3, time"),
    )
    judged = evaluate(
        folder,
        dense=MODEL,
        text=JUDGING,
        generation=True,
        prompts=PROMPTS,
        sequence_length=512,
        windows=judged_windows,
        progress=Labelled(listener, "3 of 3, judge"),
    )
    page = report([folder], folder / "report.html").page
    return DemoResult(MODEL, pruned, timed, judged, page)
