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
        o.option(
            help="Comma-separated: packed, packed in transformers, dense bf16, dense int8, "
            "torch bf16, torch int8; or all. [packed, dense bf16, dense int8, torch bf16]"
        ),
    ] = None,
    gguf: Annotated[
        list[str] | None,
        o.option(help="GGUF file for llama.cpp (needs xllamacpp); may be repeated."),
    ] = None,
    prompt_tokens: Annotated[int, o.option(help="Length of the prompt.")] = 32,
    new_tokens: Annotated[int, o.option(help="Tokens written in each round.")] = 8,
    rounds: Annotated[int, o.option(help="Rounds, at most.")] = 5,
    seconds: Annotated[
        float, o.option(help="Begin no round after this time; two rounds are always made.")
    ] = 30,
    as_json: o.Json = False,
) -> None:
    """Measure speed and memory at batch 1 on the CPU, packed and in other ways, in turns."""
    from secateur.cli.progress import show_progress
    from secateur.cli.rendering import print_result
    from secateur.evaluation.contenders import CONTENDERS
    from secateur.workflows.judge.bench import bench as run_bench

    chosen = None if contenders is None else [name.strip() for name in contenders.split(",")]
    with show_progress() as progress:
        result = run_bench(
            model,
            contenders=CONTENDERS if chosen == ["all"] else chosen,
            gguf=gguf or (),
            prompt_tokens=prompt_tokens,
            new_tokens=new_tokens,
            rounds=rounds,
            seconds=seconds,
            progress=progress,
        )
    for reason, failed in result.failures.items():
        print(f"{', '.join(failed)} could not run: {reason}", file=sys.stderr)
    print_result(result, as_json=as_json)
    if all(speed.failure is not None for speed in result.speeds):
        sys.exit(1)
