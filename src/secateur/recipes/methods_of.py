"""The method and the allocation of a recipe, composed from their names, and back again."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from secateur.errors import PatternError, RecipeError, located
from secateur.recipes.prune import PruneRecipe
from secateur.sparsity.allocation import Allocation, allocations
from secateur.sparsity.methods import Method, compose
from secateur.sparsity.methods import methods as named

_PARAMETERS = "method_parameters"


def _composed(recipe: PruneRecipe, parameters: Mapping[str, int | float | str]) -> Method:
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
        with located(f"method override {glob!r}"):
            found[glob] = _composed(recipe, {**recipe.method_parameters, **own})
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
    implied = method.pattern.sparsity
    sparsity = implied if recipe.sparsity is None else recipe.sparsity
    if sparsity is None:
        raise RecipeError(
            f"the pattern {recipe.pattern!r} needs a sparsity",
            remedy="add --sparsity, for example --sparsity 0.5",
        )
    for glob, own in {"": sparsity, **recipe.overrides}.items():
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
    from secateur.sparsity.allocation.global_threshold import GlobalThreshold

    return GlobalThreshold(reach=1.0)


def windows_needed(recipe: PruneRecipe, method: Method, allocation: Allocation) -> bool:
    """Whether any part of a recipe reads calibration tokens."""
    tuned = recipe.reconstruction.passes or recipe.distillation.epochs
    judged = allocation.judged_tokens > 0
    return bool(method.requires | allocation.requires or judged or tuned or recipe.asymmetric)


def with_method(method: str | Method | None, options: Mapping[str, Any]) -> dict[str, Any]:
    """Add the method to the options of a run. A `Method` becomes the keys that compose it.

    Args:
        method: a name, or a composed method; None for the preset's method.
        options: all other options.

    Raises:
        RecipeError: an option contradicts the method, or no recipe can express the method.
    """
    if not isinstance(method, Method):
        return {**options, "method": method}
    keys = keys_of(method)
    own = {"score", "solver", "refine", "pattern", "scope", _PARAMETERS}
    for name in sorted(own & {key for key, value in options.items() if value is not None}):
        if options[name] != keys.get(name):
            raise RecipeError(
                f"the method already decides `{name}`: {keys.get(name)!r}, not {options[name]!r}",
                remedy=f"leave `{name}` out, or compose the method with it",
            )
    return {**options, **keys}


def keys_of(method: Method) -> dict[str, Any]:
    """The keys of a recipe that compose a method.

    Raises:
        RecipeError: no recipe can express it: a part is not registered, or two parts have
            different values for one parameter.
    """
    kept = method.score, method.solver, method.refinement
    parameters = {
        field.name: getattr(part, field.name)
        for part in kept
        if part is not None
        for field in fields(part)  # type: ignore[arg-type]
        if getattr(part, field.name) != field.default
    }
    pair = method.score_name, method.solver_name
    famous = next((n for n, known in named.items() if (known.score, known.solver) == pair), None)
    keys: dict[str, Any] = {
        "method": famous,
        "score": None if famous else method.score_name,
        "solver": None if famous else method.solver_name,
        "refine": method.refinement_name,
        "pattern": method.pattern.name,
        "scope": method.pattern.scope if len(method.pattern.scopes) > 1 else None,
    }
    own = {key: value for key, value in keys.items() if key not in ("method", "pattern")}
    try:
        recomposed = compose(keys["method"], keys["pattern"], **own, **parameters)
    except (RecipeError, PatternError):
        recomposed = None
    if recomposed != method:
        raise RecipeError(
            f"no recipe composes the method {method.name!r} with these parts: {method}",
            remedy="register its parts under their names, and give one value to a parameter that "
            "several parts have; see CONTRIBUTING.md",
        )
    return {**keys, _PARAMETERS: parameters}
