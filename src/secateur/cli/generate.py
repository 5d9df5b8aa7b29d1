"""`secateur generate`: let a model speak."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from secateur.cli import options as o

__all__ = ["generate"]


def generate(
    model: Annotated[
        str, typer.Argument(help="Folder (compressed or not), hub id, GGUF file or named sample.")
    ],
    prompt: Annotated[str, typer.Option(help="The text to continue, as it is.")],
    max_new_tokens: Annotated[int, typer.Option(help="Where to stop at the latest.")] = 64,
    temperature: Annotated[
        float, typer.Option(help="0 takes the most likely token each time; above 0 draws.")
    ] = 0.0,
    seed: Annotated[int, typer.Option(help="Of the draw.")] = 0,
    trust_remote_code: o.TrustRemoteCode = False,
    as_json: o.Json = False,
) -> None:
    """Continue a prompt on the CPU; packed linears stay packed."""
    from secateur.cli.rendering import print_result
    from secateur.workflows.judge.generate import generate as run_generation

    written = False

    def tell(text: str) -> None:
        nonlocal written
        if not as_json:
            sys.stdout.write(text if written else prompt + text)
            sys.stdout.flush()
        written = True

    made = run_generation(
        model,
        prompt,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        seed=seed,
        trust_remote_code=trust_remote_code,
        tell=tell,
    )
    if as_json:
        print_result(made, as_json=True)
        return
    typer.echo()
    typer.echo(made.account, err=True)
