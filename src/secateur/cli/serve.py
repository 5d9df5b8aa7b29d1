"""`secateur serve`: OpenAI's API for a model."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from secateur.cli.verb import command

if TYPE_CHECKING:
    from secateur.recipes.running import ServeRecipe


def _run(recipe: ServeRecipe, *, as_json: bool) -> None:
    """Load the model, say where it listens, and answer until SIGTERM or Ctrl-C."""
    from secateur.workflows.serve import prepare

    serving = prepare(recipe)
    for line in serving.lines:
        print(line, file=sys.stderr)
    if as_json:
        import json

        print(json.dumps({"address": serving.address}), flush=True)
    print(f"listening on {serving.address}/v1; Ctrl-C ends it", file=sys.stderr, flush=True)
    serving.run()


serve = command("serve", _run, streams=True)
