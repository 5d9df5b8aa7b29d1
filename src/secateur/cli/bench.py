"""`secateur bench`: how fast, how large, and beside what."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from secateur.cli import options as o

if TYPE_CHECKING:
    from secateur.workflows.judge.bench import BenchReport

__all__ = ["bench"]


def bench(
    model: Annotated[str, typer.Argument(help="Folder, compressed or not; hub id; named sample.")],
    contenders: Annotated[
        str | None,
        typer.Option(help="Comma-separated; by default all that our library can run."),
    ] = None,
    gguf: Annotated[
        list[str] | None,
        typer.Option(help="GGUF file for llama.cpp (needs xllamacpp); may be repeated."),
    ] = None,
    prompt_tokens: Annotated[int, typer.Option(help="Length of the prompt.")] = 64,
    new_tokens: Annotated[int, typer.Option(help="Tokens written in each round.")] = 32,
    rounds: Annotated[int, typer.Option(help="Rounds that count; one more warms up.")] = 5,
    as_json: o.Json = False,
) -> None:
    """Measure speed and memory at batch 1 on the CPU, packed and in all other ways, in turns."""
    from secateur.cli.progress import show_progress
    from secateur.cli.rendering import print_json
    from secateur.evaluation.contenders import CONTENDERS
    from secateur.workflows.judge.bench import bench as run_bench

    with show_progress() as progress:
        report = run_bench(
            model,
            contenders=[name.strip() for name in contenders.split(",")]
            if contenders
            else CONTENDERS,
            gguf=gguf or (),
            prompt_tokens=prompt_tokens,
            new_tokens=new_tokens,
            rounds=rounds,
            progress=progress,
        )
    if as_json:
        print_json({"model": model, **report.to_json()})
    else:
        show(model, report)
    if all(speed.failure is not None for speed in report.speeds):
        raise typer.Exit(1)


def show(model: str, report: BenchReport) -> None:
    """What was measured, for people."""
    from secateur.cli.rendering import print_table

    p = report.protocol
    rows = []
    for told in (s.to_json(p["prompt_tokens"]) for s in report.speeds):
        if "failure" in told:
            rows.append((told["contender"], told["failure"], "", "", "", ""))
            continue
        spread = f"{told['tokens_per_second_least']:.1f} to {told['tokens_per_second_most']:.1f}"
        rows.append(
            (
                told["contender"],
                f"{told['tokens_per_second']:.1f}",
                spread,
                f"{1e3 * told['first_token_seconds']:.0f} ms",
                f"{told['prompt_tokens_per_second']:.0f}",
                f"{told['resident_bytes'] / 2**20:.0f} MiB",
            )
        )
    columns = ("", "tokens/s", "least to most", "first token", "prompt tokens/s", "memory")
    print_table(model, columns, rows)
    typer.echo(
        f"weight files {report.file_bytes / 2**20:.0f} MiB; dense bfloat16 would be "
        f"{report.dense_bytes / 2**20:.0f} MiB"
    )
    typer.echo(report.verdict)
    typer.echo(
        f"{p['cpu']}, {p['threads']} threads, kernels {p['kernels']}; batch 1, prompt of "
        f"{p['prompt_tokens']} tokens, {p['new_tokens']} new ones, medians of {p['rounds']} "
        "interleaved rounds"
    )
