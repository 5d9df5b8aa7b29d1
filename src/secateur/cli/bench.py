"""`secateur bench`: speed and memory of a model, next to other ways to run it."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from secateur.cli.verb import command

if TYPE_CHECKING:
    from secateur.recipes.measure import BenchRecipe


def _run(recipe: BenchRecipe) -> Any:
    """Time with a progress bar. Print on stderr why a contender could not run."""
    from secateur.cli.progress import show_progress
    from secateur.evaluation.speed import CONTENDERS
    from secateur.workflows.judge.bench import bench as run_bench

    options = dict(recipe)
    if recipe.contenders == ("all",):
        options["contenders"] = CONTENDERS
    with show_progress() as progress:
        result = run_bench(**options, progress=progress)
    for reason, failed in result.failures.items():
        print(f"{', '.join(failed)} could not run: {reason}", file=sys.stderr)
    return result


def _exit_code(result: Any) -> int:
    """1 if nothing could run."""
    return int(all(speed.failure is not None for speed in result.speeds))


bench = command("bench", _run, exit_code=_exit_code)
