"""Allocation over a model: one pass through the dense model sets the sparsity of each linear.

The result is a task for each linear. The run later chooses the weights to prune, layer by layer,
on the inputs of the pruned model. For the global scope with scores that do not depend on
inputs (magnitude, gradient), the result is exactly the mask of one threshold.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, cast

from safetensors import safe_open
from torch import Tensor

from secateur.engine.choose.levels import search_levels
from secateur.engine.choose.survey import Survey, grains_of, plain
from secateur.engine.prune.tasks import Tasks, with_sparsities
from secateur.precision import full_float32
from secateur.runs.atomic import write_json
from secateur.sparsity.allocation import Allocation
from secateur.sparsity.allocation.budget import Granularity, settle
from secateur.sparsity.allocation.search import LevelSearch


def settled_allocation(work: Path) -> Path:
    """The file with the sparsity of every linear."""
    return work / "allocation.json"


@full_float32()
def allocate(survey: Survey, allocation: Allocation, sparsity: float) -> Tasks:
    """Return the tasks of a run with the sparsities of an allocation in place of uniform ones.

    Linears with their own sparsity keep it and do not compete. Excluded linears stay dense.

    Args:
        survey: survey of the dense model.
        allocation: sets the sparsity of each linear.
        sparsity: sparsity of the whole model.
    """
    grains = grains_of(survey.tasks, allocation)
    if allocation.reach == 0 or not grains:
        return survey.tasks
    settled, ranks = settled_allocation(survey.work), survey.settings.ranks
    if not ranks.once(settled.exists):
        files = survey.execute(allocation, grains)
        ranks.once(lambda: settle_into(settled, survey, allocation, grains, files, sparsity))
    found = ranks.once(lambda: json.loads(settled.read_text()))
    return with_sparsities(survey.tasks, found["sparsity_of"])


def settle_into(
    settled: Path,
    survey: Survey,
    allocation: Allocation,
    grains: dict[str, Granularity],
    files: list[Path],
    sparsity: float,
) -> None:
    """Write the sparsity of every linear into a file, from what the survey has stored."""
    found: dict[str, Any] = {}
    if allocation.judged_tokens:
        levels = search_levels(survey, cast(LevelSearch, allocation), grains, files)
        wished = levels.sparsity_of
        found = {
            "divergence": levels.divergence,
            "uniform_divergence": levels.uniform_divergence,
        }
    else:
        wished = allocation.wish(partial(stored, files), grains, sparsity)
    shares = {
        name: plain(survey.tasks[name], share) for name, share in settle(wished, grains).items()
    }
    write_json(settled, {"sparsity_of": shares, **found})
    for file in files:
        file.unlink()


def stored(files: list[Path]) -> Iterator[tuple[str, Tensor]]:
    """The allocation's stored values of all layers, with one tensor in memory at a time."""
    for path in files:
        with safe_open(path, "pt") as file:
            for name in sorted(file.keys()):
                yield name, file.get_tensor(name)
