"""Prunes a checkpoint on a Ray cluster: Ray starts the processes, and they share the work."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

from secateur.parallel.processes import joined
from secateur.parallel.ray_launcher import launch
from secateur.progress import Progress, Silent
from secateur.recipes.prune import PruneRecipe
from secateur.recipes.reading import build_recipe
from secateur.reporting.results.prune import PruneResult
from secateur.workflows.prune.checkpoint import report_of, run_recipe
from secateur.workflows.prune.order import follow, refuse_several
from secateur.workflows.prune.prepare import choose_device

Showing = Callable[[], AbstractContextManager[Progress]]
"""Makes what shows the progress, in the first process."""


def silently() -> AbstractContextManager[Progress]:
    """Show no progress."""
    return nullcontext(Silent())


def prune_on_ray(
    recipe: PruneRecipe, call: Mapping[str, bool], showing: Showing = silently
) -> PruneResult:
    """Carry out a recipe in processes that Ray starts.

    Args:
        recipe: the recipe. All machines see its files under the same names.
        call: `resume`, `restart` and `overwrite`, as `run_recipe` takes them.
        showing: makes what shows the progress.

    Raises:
        SecateurError: as `run_recipe`; and if Ray or its cluster is missing.
    """
    cluster = recipe.cluster
    assert cluster.ray is not None
    refuse_several(recipe, count=cluster.processes or 2)
    on_gpu = recipe.device != "cpu" and choose_device(recipe.device).type == "cuda"
    values = recipe.model_dump(mode="json", exclude={"cluster"})
    work = partial(do_share, values, dict(call), showing)
    launch(cluster.ray, cluster.processes, on_gpu, work)
    return report_of(Path(recipe.output or "").absolute())


def do_share(values: dict[str, Any], call: dict[str, bool], showing: Showing) -> None:
    """What one process does."""
    recipe = build_recipe(PruneRecipe, values)
    with joined(recipe.device) as ranks:
        if not ranks.first:
            follow(recipe, ranks)
            return
        with showing() as progress:
            run_recipe(recipe, progress, **call, ranks=ranks)
