"""The step of a cut that chooses experts, which several processes can share.

The first process does everything that one process does. When it surveys experts, it sends a job;
the others open the same model and pass their own calibration windows through it. All sums are added
up. Everything else, which takes seconds, is done by the first process while the others wait.
"""

from __future__ import annotations

import shutil
import socket
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from secateur.calibration.windows import load_windows
from secateur.engine.search.experts import (
    ExpertChoice,
    ExpertUse,
    expert_use,
    kept_experts,
    merge_experts,
)
from secateur.engine.stream.targets import CheckpointTarget, walk_layers
from secateur.errors import RecipeError
from secateur.models.experts import OpenExperts
from secateur.models.opening import copy_of, open_weights
from secateur.models.sources import resolve
from secateur.parallel.ranks import Ranks, refuse_another_model
from secateur.progress import Silent
from secateur.recipes.structure import StructureRecipe, WhatToCut
from secateur.runs.environment import choose_device
from secateur.runs.output import whole_folder
from secateur.structured.cut import Cut
from secateur.structured.cut_steps import CutContext

SHARED = {"model", "experts"}
"""The fields of `WhatToCut` that several processes may fill."""


@dataclass(frozen=True)
class SurveyJob:
    """What the other processes need to survey experts.

    Attributes:
        windows: file of the calibration windows, as the first process sees it.
        source: digest of the names, shapes and dtypes of the model's tensors.
    """

    windows: str
    source: str


def choose_experts(context: CutContext, folder: Path) -> tuple[Cut, dict[str, Any], Path]:
    """Choose the experts to keep, and merge the others into them if the recipe says so."""
    target, recipe = context.target(folder), context.recipe
    assert context.plan.keep_experts is not None
    tokens = recipe.memory.micro_batch_tokens
    job = SurveyJob(str(context.windows_file), target.reader.tensor_digest)
    context.ranks.once(lambda: asdict(job))
    use = expert_use(target, context.windows, tokens, context.progress, context.ranks)
    config, experts = target.model.config, target.architecture.experts
    assert experts is not None
    how = ExpertChoice(
        experts.per_token(config) or 1,
        "frequency" if recipe.experts_by == "merge" else recipe.experts_by,
        experts.divided(config),
        recipe.experts_scope,
        recipe.calibration.seed,
    )
    kept = kept_experts(use, context.plan.keep_experts, how)
    if recipe.experts_by == "merge":
        folder = _merge_experts(context, folder, kept, use)
    notes = {
        "by": recipe.experts_by,
        "scope": recipe.experts_scope,
        "use": {str(layer): of_layer.to_json() for layer, of_layer in use.items()},
    }
    return Cut(experts=kept), notes, folder


def _merge_experts(
    context: CutContext,
    folder: Path,
    kept: Mapping[int, tuple[int, ...]],
    use: Mapping[int, ExpertUse],
) -> Path:
    """Write a copy of a model in which the experts that stay have taken up the others."""
    made = context.work / "merged"
    shutil.rmtree(made, ignore_errors=True)
    with whole_folder(made) as partial:
        target = context.target(folder)
        target.output = copy_of(target.reader, partial)
        target.output.create(context.progress)
        experts = target.architecture.experts
        assert experts is not None
        for index, layer in walk_layers(target, sorted(kept)):
            router = layer.get_submodule(experts.router).get_parameter("weight")
            module = layer.get_submodule(experts.module)
            assert isinstance(module, OpenExperts)
            merge_experts(module, router, kept[index], use[index].tokens)
            prefix = f"{target.architecture.layer_name(index)}.{experts.module}"
            names = (f"{e}.{n}" for e in kept[index] for n, _ in module[e].named_parameters())
            target.commit(index, [f"{prefix}.{name}" for name in names])
    return made


def run_worker(recipe: StructureRecipe, ranks: Ranks) -> None:
    """Do the share of one process, which is not the first.

    Args:
        recipe: the recipe; the first process has the same.
        ranks: the processes.

    Raises:
        RecipeError: this process sees other files than the first one.
    """
    while (content := ranks.once(lambda: None)) is not None:
        job = SurveyJob(**content)
        file = Path(job.windows)
        if not file.exists():
            raise RecipeError(
                f"process {ranks.rank} on {socket.gethostname()} does not see the calibration "
                "windows of the run",
                where=job.windows,
                remedy="put --output on a file system that all machines share",
            )
        trust = recipe.trust_remote_code
        source = resolve(recipe.model, dtype=recipe.dtype, trust_remote_code=trust)
        reader = open_weights(source.folder)
        if reader.tensor_digest != job.source:
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
