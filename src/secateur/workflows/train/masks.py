"""The zeros that a training holds: the zeros of the model, or of masks that the recipe names.

Masks that do not fit are refused before any work. A training that holds fewer zeros than the model
has would produce a denser model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from secateur.errors import RecipeError
from secateur.models.checkpoint import CheckpointReader
from secateur.models.skeleton import build_skeleton
from secateur.models.stored_parameters import StoredModel
from secateur.recipes.train import TrainRecipe
from secateur.training.masks import Masks, local, matrices, stored_masks
from secateur.training.process_group import ProcessGroup

BY_CHANCE = 0.001
"""The share of zeros that a matrix may have by chance in a dense model."""


def masks_of(recipe: TrainRecipe, model: Any, processes: ProcessGroup) -> Masks:
    """Return the masks that a training holds.

    Args:
        recipe: may name masks. Without them, the training holds the zeros of the model.
        model: the model with its initial weights; it may be sharded.
        processes: the processes.

    Raises:
        RecipeError: the masks belong to another model, hold no zeros, or would free weights that
            are zero in the model.
        SourceError: the file holds no masks.
    """
    if recipe.mask is None:
        return Masks.of(model)
    prunes = recipe.gradual is not None or recipe.iterative is not None
    return masks_in(
        Path(recipe.mask),
        model,
        trust_remote_code=recipe.trust_remote_code,
        regrows=recipe.regrow or prunes,  # pruning keeps the zeros itself
        sums=processes.sums,
    )


def masks_in(
    place: Path,
    model: Any,
    *,
    trust_remote_code: bool = False,
    regrows: bool = False,
    sums: Callable[[Sequence[float]], list[float]] = list,
) -> Masks:
    """Return the masks of a file or of a pruned folder, for a model that is about to be trained.

    Args:
        place: a file of masks, or the folder of a pruned model.
        model: the model with its initial weights; it may be sharded.
        trust_remote_code: whether code that comes with the folder may run.
        regrows: whether zeros that the masks do not hold may become nonzero.
        sums: adds up each number over all processes that share the model.

    Raises:
        RecipeError: as for `masks_of`.
        SourceError: the file holds no masks.
    """
    if place.is_dir():
        found = zeros_of_folder(place, model, trust_remote_code)
    else:
        found = stored_masks(place)
    masks = Masks.given(model, found)
    refuse_lost(masks, model, sums, place, regrows)
    return masks


def zeros_of_folder(folder: Path, model: Any, trust: bool) -> Iterator[tuple[str, Tensor]]:
    """Yield the nonzero masks of the matrices of a checkpoint, one at a time.

    Raises:
        RecipeError: its matrices differ from the model's.
    """
    skeleton = build_skeleton(folder, trust_remote_code=trust, opened=False)
    stored = StoredModel(skeleton, CheckpointReader(folder))
    there, own = (set(matrices(x)) for x in (skeleton, model))
    if there != own:
        odd = min(there ^ own)
        holder = "the folder of masks" if odd in there else "the model"
        raise RecipeError(
            f"only {holder} has a matrix {odd}; {len(there & own)} of {len(own)} matrices of "
            "the model are in both",
            where=str(folder),
            remedy="name a pruned folder of this model; a cut model needs masks of its own",
        )
    for name in matrices(skeleton):
        yield name, stored.read(name) != 0


@torch.no_grad()
def refuse_lost(
    masks: Masks,
    model: Any,
    sums: Callable[[Sequence[float]], list[float]],
    place: Path,
    regrows: bool,
) -> None:
    """Refuse masks that would lose zeros of the model's matrices.

    Args:
        masks: this process's part of the masks.
        model: the model in training.
        sums: adds up the counts of all processes.
        place: the source of the masks.
        regrows: whether zeros that the masks do not hold may become nonzero.

    Raises:
        RecipeError: the masks have no zeros, or a matrix has more than `BY_CHANCE` of zeros that
            the masks do not hold.
    """
    weights = matrices(model)
    counts: list[float] = []
    for name, weight in weights.items():
        lost = local(weight) == 0
        held = 0
        if name in masks.kept:
            kept = local(masks.kept[name])
            held = int((~kept).sum())
            lost &= kept
        counts += [held, int(lost.sum())]
    counts = sums(counts)
    if not sum(counts[::2]):
        raise RecipeError(
            "the masks keep every weight: there is not one zero in them",
            where=str(place),
            remedy="name a pruned folder or a file of its masks, or leave --mask out: then the "
            "zeros of the model are held",
        )
    lost_of = dict(zip(weights, counts[1::2], strict=True))
    losing = {n: c for n, c in lost_of.items() if c > BY_CHANCE * weights[n].numel()}
    if losing and not regrows:
        worst = max(losing, key=lambda name: losing[name] / weights[name].numel())
        share = losing[worst] / weights[worst].numel()
        raise RecipeError(
            f"{int(sum(losing.values()))} weights in {len(losing)} matrices are zero in the model, "
            f"but the masks keep them, so training would fill them: {share:.1%} of {worst}",
            where=str(place),
            remedy="leave --mask out to hold the zeros of the model; if they shall come back, add "
            "--set regrow=true",
        )
