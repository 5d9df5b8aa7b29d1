"""`secateur demo`: a real model pruned, packed, timed, judged and reported, without a hub."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from secateur.cli import options as o

if TYPE_CHECKING:
    from secateur.progress import Progress

__all__ = ["demo"]

MODEL = "smollm2-135m"
CALIBRATION, JUDGING = "boolq-calibration", "boolq-held-out"
CONTENDERS = ("packed", "dense int8", "dense bf16", "torch bf16")
"""What is timed: the packed model, our kernels on dense weights, and torch."""
PROMPTS = (
    "The Eiffel Tower is a famous landmark in",
    "Once upon a time, in a village by the sea, there lived an old woman who",
)


@dataclass(frozen=True)
class Shown:
    """What the demo measured.

    Attributes:
        pruned: the report of `prune`.
        bench: the report of `bench`.
        judged: the results of `evaluate`.
        page: the report.
    """

    pruned: Any
    bench: Any
    judged: Any
    page: Path


def demo(
    *,
    output: Annotated[str, o.option("--output", "-o", help="Folder for it.")] = "demo-run",
    sparsity: Annotated[float, o.option(help="Fraction of zeros.")] = 0.5,
    effort: Annotated[str, o.option(help="Preset: fast, balanced or best.")] = "balanced",
    windows: Annotated[int, o.option(help="Calibration windows of 512 tokens.")] = 48,
    judged_windows: Annotated[int, o.option(help="Windows of 512 tokens to judge on.")] = 16,
    as_json: o.Json = False,
) -> None:
    """Prune SmolLM2-135M, pack it, time it, judge it beside the dense model; write a report."""
    from secateur.cli.progress import show_progress
    from secateur.cli.rendering import print_json

    with show_progress() as progress:
        shown = carry_out(Path(output), sparsity, effort, windows, judged_windows, progress)
    if as_json:
        parts = {
            "prune": shown.pruned.to_json(),
            "bench": shown.bench.to_json(),
            "evaluation": shown.judged.to_json(),
        }
        print_json({"report": str(shown.page), **parts})
        return
    show(shown)
    show_places(Path(output), shown.page)


def carry_out(
    folder: Path,
    sparsity: float,
    effort: str,
    windows: int,
    judged_windows: int,
    listener: Progress,
) -> Shown:
    """The four steps; the report is written at the end."""
    from secateur.progress import Labelled
    from secateur.workflows.judge.bench import bench
    from secateur.workflows.judge.evaluate import evaluate
    from secateur.workflows.pruning import prune
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
        text=[JUDGING],
        generation=True,
        prompts=PROMPTS,
        sequence_length=512,
        windows=judged_windows,
        progress=Labelled(listener, "3 of 3, judge"),
    )
    page = report([folder], folder / "report.html").page
    return Shown(pruned, timed, judged, page)


def show(shown: Shown) -> None:
    """Size, speed and quality beside the dense model, and what both write."""
    from secateur.cli.rendering import gib, mib, print_table, stdout

    [text], packed, cost = (
        shown.judged.perplexity,
        shown.pruned.compression,
        shown.pruned.manifest["cost"],
    )
    rates = {s.name: s.tokens_per_second for s in shown.bench.speeds if s.failure is None}
    dense = {name: rate for name, rate in rates.items() if name != "packed"}
    fastest = max(dense, key=lambda name: dense[name]) if dense else ""
    rows = [
        ("weight files", f"{mib(packed.bfloat16_bytes)} (bfloat16)", mib(packed.file_bytes)),
        (
            "tokens a second",
            f"{dense[fastest]:.0f} ({fastest})" if fastest else "",
            f"{rates.get('packed', 0):.0f}",
        ),
        ("perplexity", f"{text.reference_perplexity:.2f}", f"{text.perplexity:.2f}"),
        ("zeros in decoder matrices", "", f"{packed.sparsity:.1%}"),
        ("time to prune", "", f"{cost['seconds']:.0f} s"),
        ("peak memory", "", gib(cost["peak_resident_bytes"])),
    ]
    print_table(MODEL, ("", "dense", "pruned, int8"), rows)
    first = shown.judged.generation[0].samples[0]
    for name, words in (("dense", first.reference_text or ""), ("pruned", first.text)):
        stdout.print(f"\n[bold]{name} writes:[/] ", end="")
        stdout.print(f"{first.prompt}{words}", markup=False)


def show_places(folder: Path, page: Path) -> None:
    """Where everything is, and what to try next."""
    from secateur.cli.rendering import show_next

    place = shlex.quote(str(folder))
    show_next(
        {"the packed model": folder, "its card": folder / "README.md", "the report": page},
        {
            "let it write": f"secateur generate {place} --prompt 'The capital of France is'",
            "time it in more ways": f"secateur bench {place}",
            "prune your own model": "secateur prune MODEL --sparsity 0.5 --compress int8 "
            "--output DIR",
            "plan it first": "secateur plan MODEL --sparsity 0.5",
        },
    )
