"""The method and the allocation of a pruning recipe, composed from their names."""

from __future__ import annotations

from collections.abc import Mapping

from secateur.errors import RecipeError
from secateur.recipes.presets import presets
from secateur.recipes.prune import PruneRecipe
from secateur.reporting.results.methods import MethodsResult
from secateur.sparsity.allocation import Allocation, allocations
from secateur.sparsity.allocation.global_threshold import GlobalThreshold
from secateur.sparsity.methods import Method, compose
from secateur.sparsity.methods import methods as named


def methods() -> MethodsResult:
    """All presets, methods and their parts, with what each needs."""
    return MethodsResult({name: presets[name] for name in presets})


def _composed(recipe: PruneRecipe, parameters: Mapping[str, int | float]) -> Method:
    """The method of a recipe with some parameters."""
    return compose(
        recipe.method,
        recipe.pattern,
        scope=recipe.scope,
        score=recipe.score,
        solver=recipe.solver,
        refine=recipe.refine,
        **parameters,
    )


def own_methods(recipe: PruneRecipe) -> dict[str, Method]:
    """The methods of linears that have parameters of their own, by glob.

    Raises:
        RecipeError: a parameter is unknown or out of range; the message names the glob.
    """
    found = {}
    for glob, own in recipe.method_overrides.items():
        try:
            found[glob] = _composed(recipe, {**recipe.method_parameters, **own})
        except RecipeError as error:
            where = f"method override {glob!r}"
            raise RecipeError(error.what, where=where, remedy=error.remedy) from None
    return found


def method_of(recipe: PruneRecipe) -> tuple[Method, float]:
    """Return the method and the sparsity of a recipe.

    Raises:
        RecipeError, PatternError: a name is unknown, or the parts do not fit together.
    """
    for part in ("score", "solver"):
        given = getattr(recipe, part)
        known = named[recipe.method] if recipe.method and recipe.method in named else None
        decided = getattr(known, part) if known else given
        if given not in (None, decided):
            raise RecipeError(
                f"the method {recipe.method!r} has the {part} {decided!r}, but {given!r} is given",
                where=f"--{part}",
                remedy="name a method, or compose one of --score and --solver without --method",
            )
    method = _composed(recipe, recipe.method_parameters)
    solver, trains = method.solver, recipe.reconstruction.passes or recipe.distillation.epochs
    if solver.rounds and not solver.grid and trains:
        raise RecipeError(
            "tuning and distillation would move int8 weights off their grid",
            remedy="leave out --tune-passes and --distill-epochs, or round afterwards: "
            "secateur compress DIR --values int8 --calibration TEXT",
        )
    implied = method.pattern.sparsity
    sparsity = implied if recipe.sparsity is None else recipe.sparsity
    if sparsity is None:
        raise RecipeError(
            f"the pattern {recipe.pattern!r} needs a sparsity",
            remedy="add --sparsity, for example --sparsity 0.5",
        )
    for glob, own in {"": sparsity, **recipe.overrides}.items():
        if not 0 <= own < 1:
            raise RecipeError(
                f"sparsity {own:g} is not a fraction of zeros in [0, 1)",
                where=f"override {glob!r}" if glob else "--sparsity",
                remedy="0.5 prunes half of the weights",
            )
        if implied is not None and own and abs(own - implied) > 1e-6:
            raise RecipeError(
                f"{recipe.pattern} always has sparsity {implied:g}, not {own:g}",
                where=f"override {glob!r}" if glob else "--sparsity",
                remedy="leave the sparsity out, or choose another N:M",
            )
    return method, sparsity


def allocation_of(recipe: PruneRecipe, method: Method) -> Allocation:
    """Return the allocation of a recipe. The global scope is an allocation without floors and caps.

    Raises:
        RecipeError: the name is unknown, or the pattern leaves nothing to allocate.
    """
    allocation = allocations[recipe.allocation]()
    pattern = method.pattern
    if allocation.reach > 0 and pattern.sparsity is not None:
        raise RecipeError(
            f"the pattern {pattern.name} has one sparsity for every linear, so there is nothing "
            f"for the allocation {recipe.allocation!r} to decide",
            remedy="use the pattern 'unstructured' or blocks, or leave the allocation out",
        )
    if pattern.scope != "global":
        return allocation
    if allocation.reach > 0:
        raise RecipeError(
            "with the scope 'global' one threshold decides how much each linear loses, so there "
            f"is nothing for the allocation {recipe.allocation!r} to decide",
            remedy="leave one of the two out; the allocation 'global' is the threshold with a "
            "floor and a cap for each linear",
        )
    return GlobalThreshold(reach=1.0)
