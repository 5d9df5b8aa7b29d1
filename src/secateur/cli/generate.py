"""`secateur generate`: let a model speak."""

from __future__ import annotations

import sys
from typing import Annotated

from secateur.cli import options as o

__all__ = ["generate"]


def generate(
    model: Annotated[
        str, o.argument(help="Folder (compressed or not), hub id, GGUF file or named sample.")
    ],
    *,
    prompt: Annotated[str, o.option(help="The text to continue, as it is.")],
    max_new_tokens: Annotated[int, o.option(help="Where to stop at the latest.")] = 64,
    temperature: Annotated[
        float, o.option(help="0 takes the most likely token each time; above 0 draws.")
    ] = 0.0,
    seed: Annotated[int, o.option(help="Of the draw.")] = 0,
    trust_remote_code: o.TrustRemoteCode = False,
    as_json: o.Json = False,
) -> None:
    """Continue a prompt on the CPU; packed linears stay packed."""
    from secateur.cli.rendering import print_json
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
        print_json({"model": model, **made.to_json()})
        return
    rate = "" if made.tokens_per_second is None else f", {made.tokens_per_second:.1f} tokens/s"
    print()
    print(f"{made.tokens} tokens{rate} ({made.loop})", file=sys.stderr)
