"""What of a model is trained, and what its masks do meanwhile.

weights     the masks are held                                      the default
lora        adapters learn, with the masks in their products; merged at the end
gradual     the masks lose more weights every few steps
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from secateur.errors import RecipeError
from secateur.recipes.train import GradualOptions, RetrainRecipe
from secateur.sparsity.patterns import parse_pattern
from secateur.sparsity.schedules import schedules
from secateur.sparsity.scores import scores
from secateur.training.gradual import Gradual, GradualPruning, open_masks
from secateur.training.loop import Hook
from secateur.training.lora import ADAPTERS_ALONE, Adapters, attach, merge
from secateur.training.masks import Masks
from secateur.training.process_group import ProcessGroup
from secateur.training.selecting import Criterion
from secateur.types import Windows

__all__ = ["Adapted", "adapt", "merged", "rates_of"]


@dataclass(frozen=True)
class Adapted:
    """A model that is ready for the loop.

    Attributes:
        model: what the loop trains.
        held: the masks that it holds; None where adapters hold them.
        masks: what is zero in the result.
        hooks: what is done after every step.
    """

    model: Any
    held: Masks | None
    masks: Masks
    hooks: tuple[Hook, ...] = ()


def adapt(
    recipe: RetrainRecipe, model: Any, masks: Masks, windows: Windows, processes: ProcessGroup
) -> Adapted:
    """Make a model ready as a recipe says, in place.

    Args:
        recipe: of a training.
        model: with the weights it begins with.
        masks: what is pruned now.
        windows: that are trained on, for scores that need some.
        processes: the processes.

    Raises:
        RecipeError: adapters and gradual pruning are both asked for, or cannot be had.
    """
    if recipe.lora is None and recipe.gradual is None:
        return Adapted(model, masks, masks)
    if recipe.lora is not None and recipe.gradual is not None:
        raise RecipeError(
            "adapters keep the zeros there are, gradual pruning makes new ones",
            remedy="prune first, then train adapters",
        )
    if processes.ranks > 1:
        raise RecipeError(
            "adapters and gradual pruning need a single process",
            remedy="start the command without torchrun or accelerate launch",
        )
    masks = masks.held_in(model)
    masks.apply(model)
    if recipe.lora is not None:
        return Adapted(attach(model, adapters(recipe), recipe.seed).get_base_model(), None, masks)
    assert recipe.gradual is not None
    opened = open_masks(model)
    hook = GradualPruning(opened, gradual(recipe.gradual, Masks(opened).sparsity, windows))
    # What is zero elsewhere (experts that are stored in one tensor) stays as it is.
    held = Masks({**Masks.of(model).kept, **opened})
    return Adapted(model, held, held, (hook,))


def adapters(recipe: RetrainRecipe) -> Adapters:
    """The adapters of a recipe."""
    how = recipe.lora
    assert how is not None
    alpha = 2.0 * how.rank if how.alpha is None else how.alpha
    return Adapters(how.rank, alpha, how.dropout, how.include, how.exclude)


def rates_of(recipe: RetrainRecipe) -> Mapping[str, float]:
    """Factors of the learning rate; with adapters all else is frozen.

    Raises:
        RecipeError: rates are given for what is frozen.
    """
    if recipe.lora is None:
        return recipe.rates
    if recipe.rates:
        raise RecipeError(
            "with adapters nothing else is trained, so rates say nothing",
            remedy="leave rates out; lora.include and lora.exclude choose the linears",
        )
    return ADAPTERS_ALONE


def gradual(how: GradualOptions, sparsity: float, windows: Windows) -> Gradual:
    """Gradual pruning from the sparsity there is.

    Raises:
        RecipeError: it says no sparsity, or one below the one there is.
        PatternError: the pattern has another one.
    """
    pattern = parse_pattern(how.pattern, how.scope)
    last = how.sparsity if pattern.sparsity is None else pattern.sparsity
    if last is None:
        raise RecipeError(
            "gradual pruning needs a sparsity to end at",
            remedy="--gradual 0.8, or --gradual 2:4",
        )
    if how.sparsity not in (None, last):
        raise RecipeError(
            f"the pattern {how.pattern} has the sparsity {last:g}, not {how.sparsity:g}",
            remedy="leave the sparsity out",
        )
    if sparsity > last:
        raise RecipeError(
            f"{sparsity:.1%} of the weights are zero already, {last:.1%} are to be at the end",
            remedy="prune on to more, or begin with a denser model",
        )
    schedule: Any = schedules[how.schedule]
    return Gradual(
        schedule(last, sparsity),
        Criterion(scores[how.score](), pattern, windows[: how.windows]),
        how.every,
        how.begin,
        how.end,
        how.regrowth,
    )


def merged(recipe: RetrainRecipe, model: Any, masks: Masks, trained: Mapping[str, Tensor]) -> Any:
    """The model of the end, from the one of the beginning and what was trained.

    Args:
        recipe: of the training.
        model: with the weights it began with; it is changed in place.
        masks: what is zero in the result.
        trained: parameters by name, of adapters where there are any.
    """
    adapted = None
    if recipe.lora is not None:
        masks.apply(model)
        adapted = attach(model, adapters(recipe))
        model = adapted.get_base_model()
    for name, value in trained.items():
        model.get_parameter(name).data.copy_(value)
    return model if adapted is None else merge(adapted)
