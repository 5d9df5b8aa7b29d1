"""Prepares a model for a training: its trained parameters and its masks.

weights     all weights learn, the masks stay                       the default
lora        adapters learn, with the masks in their products; they are merged at the end
gradual     the masks lose weights every few steps
iterative   the masks lose weights in rounds, with a training after each
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from secateur.engine.prune.tasks import refuse_idle_globs
from secateur.errors import RecipeError
from secateur.models.architecture import describe
from secateur.recipes.train import (
    GradualOptions,
    IterativeOptions,
    PruningOptions,
    TrainRecipe,
)
from secateur.sparsity.patterns import parse_pattern
from secateur.sparsity.schedules import Schedule, schedules
from secateur.sparsity.scores import scores
from secateur.training.gradual import Gradual, GradualPruning, open_masks
from secateur.training.hooks import Hook
from secateur.training.lora import ADAPTERS_ALONE, Adapters, attach, merge
from secateur.training.masks import Masks
from secateur.training.process_group import ProcessGroup
from secateur.training.rounds import PruningRounds
from secateur.training.selecting import Criterion
from secateur.types import Windows


@dataclass(frozen=True)
class Adapted:
    """A model that is ready for the loop.

    Attributes:
        model: what the loop trains.
        held: the masks that it holds; None if adapters hold them.
        masks: the zeros of the result.
        hooks: work after every step.
        rounds: rounds of iterative pruning; None for one training.
        opened: the masks that gradual or iterative pruning changes, by parameter.
    """

    model: Any
    held: Masks | None
    masks: Masks
    hooks: tuple[Hook, ...] = ()
    rounds: PruningRounds | None = None
    opened: Mapping[str, Tensor] = field(default_factory=dict)


def adapt(
    recipe: TrainRecipe, model: Any, masks: Masks, windows: Windows, processes: ProcessGroup
) -> Adapted:
    """Prepare a model for the training of a recipe, in place.

    Args:
        recipe: recipe of a training.
        model: the model with its initial weights.
        masks: the current zeros.
        windows: training windows, for scores that need text.
        processes: the processes.

    Raises:
        RecipeError: adapters or gradual pruning cannot run.
    """
    if recipe.lora is None and recipe.gradual is None and recipe.iterative is None:
        return Adapted(model, masks, masks)
    masks = masks.held_in(model)
    masks.apply(model)
    if recipe.lora is not None:
        return Adapted(attach(model, adapters(recipe), recipe.seed).get_base_model(), None, masks)
    opened = open_masks(model)
    # Zeros elsewhere (experts that are stored in one tensor) stay unchanged.
    held = Masks({**Masks.of(model).kept, **opened})
    sparsity = Masks(opened).sparsity
    if recipe.iterative is not None:
        rounds = iterative(recipe.iterative, sparsity, windows)
        return Adapted(model, held, held, (), rounds, opened)
    assert recipe.gradual is not None
    hook = GradualPruning(opened, gradual(recipe.gradual, sparsity, windows))
    return Adapted(model, held, held, (hook,), None, opened)


def check_together(recipe: TrainRecipe, processes: ProcessGroup) -> None:
    """Refuse ways to train that exclude each other.

    Raises:
        RecipeError: the recipe has two of adapters, gradual and iterative pruning, or one of them
            with several processes.
    """
    ways = {"gradual": recipe.gradual, "iterative": recipe.iterative, "lora": recipe.lora}
    given = [name for name, options in ways.items() if options is not None]
    if len(given) > 1 and "lora" in given:
        raise RecipeError(
            f"adapters keep the zeros there are, {given[0]} pruning makes new ones",
            remedy="prune first, then train adapters",
        )
    if len(given) > 1:
        raise RecipeError("gradual and iterative are two ways to prune", remedy="give one")
    if given and processes.ranks > 1:
        raise RecipeError(
            f"{given[0]} needs a single process",
            remedy="start the command without torchrun or accelerate launch",
        )


def adapters(recipe: TrainRecipe) -> Adapters:
    """Return the adapters of a recipe."""
    how = recipe.lora
    assert how is not None
    alpha = 2.0 * how.rank if how.alpha is None else how.alpha
    return Adapters(how.rank, alpha, how.dropout, how.include, how.exclude)


def rates_of(recipe: TrainRecipe, model: Any) -> Mapping[str, float]:
    """Return factors of the learning rate by globs of parameter names. The last match counts.

    Args:
        recipe: recipe of a training.
        model: the model or its skeleton.

    Raises:
        RecipeError: a glob matches no parameter; or the recipe has rates, but everything except the
            adapters is frozen.
    """
    names = [name for name, _ in model.named_parameters()]
    refuse_idle_globs(recipe.rates, names, "parameter")
    if recipe.lora is None:
        return {**decayed(model, recipe.layer_decay), **recipe.rates}
    if recipe.rates or recipe.layer_decay != 1:
        raise RecipeError(
            "with adapters nothing else is trained, so --rates and --layer-decay change nothing",
            remedy="leave them out; lora.include and lora.exclude choose the linears",
        )
    return ADAPTERS_ALONE


def decayed(model: Any, decay: float) -> dict[str, float]:
    """Layer-wise learning rates.

        layer i of L        decay^(L − 1 − i)
        input embeddings    decay^L, also where the output head is tied to them
        all else            1

    Paper: Howard and Ruder 2018, "Universal Language Model Fine-tuning for Text Classification",
    arXiv:1801.06146, which divides by 2.6 from layer to layer (decay 0.38).

    Args:
        model: the model or its skeleton.
        decay: factor per layer, above 0 and at most 1; 1 changes nothing.

    Returns:
        Factors by globs of parameter names.
    """
    if decay == 1:
        return {}
    architecture = describe(model)
    layers = len(architecture.layers(model))
    embeddings = {id(p) for p in model.get_input_embeddings().parameters()}
    rates = {n: decay**layers for n, p in model.named_parameters() if id(p) in embeddings}
    for index in range(layers):
        rates[f"{architecture.layer_name(index)}.*"] = decay ** (layers - 1 - index)
    return rates


def gradual(how: GradualOptions, sparsity: float, windows: Windows) -> Gradual:
    """Return the gradual pruning of a recipe. Arguments and errors as in `pruning`."""
    schedule, criterion = pruning(how, how.schedule, sparsity, windows, "gradual")
    return Gradual(schedule, criterion, how.every, how.begin, how.end, how.regrowth)


def iterative(how: IterativeOptions, sparsity: float, windows: Windows) -> PruningRounds:
    """Return the iterative pruning of a recipe. Arguments and errors as in `pruning`."""
    schedule, criterion = pruning(how, how.schedule, sparsity, windows, "iterative")
    return PruningRounds(schedule, how.rounds, criterion, how.rewind, how.rewind_step)


def pruning(
    how: PruningOptions, schedule: str, sparsity: float, windows: Windows, way: str
) -> tuple[Schedule, Criterion]:
    """Return the schedule of the sparsity, and the rule that chooses weights.

    Args:
        how: options of the recipe.
        schedule: name of the schedule.
        sparsity: current sparsity of the model.
        windows: training windows, for scores that need text.
        way: `gradual` or `iterative`, for messages.

    Raises:
        RecipeError: the sparsity is missing, differs from the pattern's, or is below the model's.
        PatternError: there is no such pattern.
    """
    pattern = parse_pattern(how.pattern, how.scope)
    last = how.sparsity if pattern.sparsity is None else pattern.sparsity
    if last is None:
        raise RecipeError(
            f"{way} pruning needs a sparsity to end at",
            remedy=f"--{way} 0.8, or --{way} 2:4",
        )
    if how.sparsity not in (None, last):
        raise RecipeError(
            f"the pattern {how.pattern} has the sparsity {last:g}, not {how.sparsity:g}",
            remedy="leave the sparsity out",
        )
    if sparsity > last:
        raise RecipeError(
            f"{sparsity:.1%} of the weights are zero already, more than {last:.1%}, the sparsity "
            "at the end",
            remedy="give a higher sparsity, or begin with a denser model",
        )
    course: Any = schedules[schedule]
    return course(last, sparsity), Criterion(scores[how.score](), pattern, windows[: how.windows])


def merged(recipe: TrainRecipe, model: Any, masks: Masks, trained: Mapping[str, Tensor]) -> Any:
    """Return the final model, made from the initial model and the trained parameters.

    Args:
        recipe: recipe of the training.
        model: the model with its initial weights; it is changed in place.
        masks: the zeros of the result.
        trained: trained parameters by name; the adapters' parameters if there are adapters.
    """
    adapted = None
    if recipe.lora is not None:
        masks.apply(model)
        adapted = attach(model, adapters(recipe))
        model = adapted.get_base_model()
    for name, value in trained.items():
        model.get_parameter(name).data.copy_(value)
    return model if adapted is None else merge(adapted)
