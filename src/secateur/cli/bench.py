"""`secateur bench`: how fast, how large, and beside what."""

from __future__ import annotations

import sys
from typing import Annotated

from secateur.cli import options as o

__all__ = ["bench"]


def bench(
    model: Annotated[str, o.argument(help="Folder, compressed or not; hub id; named sample.")],
    *,
    contenders: Annotated[
        str | None,
        o.option(help="Comma-separated; by default all that our library can run."),
    ] = None,
    gguf: Annotated[
        list[str] | None,
        o.option(help="GGUF file for llama.cpp (needs xllamacpp); may be repeated."),
    ] = None,
    prompt_tokens: Annotated[int, o.option(help="Length of the prompt.")] = 64,
    new_tokens: Annotated[int, o.option(help="Tokens written in each round.")] = 32,
    rounds: Annotated[int, o.option(help="Rounds that count; one more warms up.")] = 5,
    as_json: o.Json = False,
) -> None:
    """Measure speed and memory at batch 1 on the CPU, packed and in all other ways, in turns."""
    from secateur.cli.progress import show_progress
    from secateur.cli.rendering import print_result
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
    print_result(report, as_json=as_json)
    if all(speed.failure is not None for speed in report.speeds):
        sys.exit(1)
