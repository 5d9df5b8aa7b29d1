"""What several processes share of a structured cut: the survey of experts.

The first process does everything that one process does. When it surveys experts it gives an order;
the others open the same model and pass their own calibration windows through it. All sums are added
up. Everything else, which takes seconds, is done by the first process while the others wait.
"""

from __future__ import annotations

import socket
from dataclasses import dataclass
from pathlib import Path

from secateur.calibration.windows import load_windows
from secateur.engine.choose.experts import expert_use
from secateur.engine.stream.targets import CheckpointTarget
from secateur.errors import RecipeError
from secateur.models.opening import open_weights
from secateur.models.sources import resolve
from secateur.parallel.ranks import Ranks
from secateur.progress import Silent
from secateur.recipes.structure import StructureRecipe, WhatToCut
from secateur.workflows.prune.order import digest_of, give, refuse_another_model
from secateur.workflows.prune.prepare import choose_device

SHARED = {"model", "experts"}
"""The fields of `WhatToCut` that several processes may fill."""


@dataclass(frozen=True)
class SurveyOrder:
    """What the other processes need to survey experts.

    Attributes:
        windows: file of the calibration windows, as the first process sees it.
        source: digest of the names, shapes and dtypes of the model's tensors.
    """

    windows: str
    source: str


def follow(recipe: StructureRecipe, ranks: Ranks) -> None:
    """Do the share of one process, which is not the first.

    Args:
        recipe: the recipe; the first process has the same.
        ranks: the processes.

    Raises:
        RecipeError: this process sees other files than the first one.
    """
    while (told := give(None, ranks)) is not None:
        order = SurveyOrder(**told)
        file = Path(order.windows)
        if not file.exists():
            raise RecipeError(
                f"process {ranks.rank} on {socket.gethostname()} does not see the calibration "
                "windows of the run",
                where=order.windows,
                remedy="put --output on a file system that all machines share",
            )
        trust = recipe.trust_remote_code
        source = resolve(recipe.model, dtype=recipe.dtype, trust_remote_code=trust)
        reader = open_weights(source.folder)
        if digest_of(reader) != order.source:
            refuse_another_model(ranks.rank, source.folder)
        target = CheckpointTarget(
            reader, None, choose_device(recipe.device), trust_remote_code=trust
        )
        tokens = recipe.memory.micro_batch_tokens
        expert_use(target, load_windows(file), tokens, Silent(), ranks)


def refuse_several(recipe: StructureRecipe, count: int) -> None:
    """Refuse what several processes cannot share yet.

    Raises:
        RecipeError: names the option.
    """
    if count == 1:
        return
    other = [
        name
        for name, field in WhatToCut.model_fields.items()
        if name not in SHARED and getattr(recipe, name) != field.default
    ]
    if recipe.learned is not None:
        other.append("learned")
    if recipe.distillation.epochs:
        other.append("distill_epochs")
    if recipe.calibration.generated_windows:
        other.append("generated_windows")
    if other:
        option = f"--{other[0].replace('_', '-')}"
        raise RecipeError(
            f"{option} does not work with several processes yet, and there are {count}: they "
            "share only the survey of --experts",
            remedy="start without torchrun, or cut the experts first and the rest in a second run",
        )
