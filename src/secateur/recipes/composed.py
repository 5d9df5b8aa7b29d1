"""Accept a composed method instead of a method's name: `prune(model, method=compose(…))`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from secateur.errors import PatternError, RecipeError
from secateur.sparsity.methods import Method, compose, methods

PARAMETERS = "method_parameters"


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
    own = {"score", "solver", "refine", "pattern", "scope", PARAMETERS}
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
    famous = next((n for n, known in methods.items() if (known.score, known.solver) == pair), None)
    keys: dict[str, Any] = {
        "method": famous,
        "score": None if famous else method.score_name,
        "solver": None if famous else method.solver_name,
        "refine": method.refinement_name,
        "pattern": method.pattern.name,
        "scope": method.pattern.scope if len(method.pattern.scopes) > 1 else None,
    }
    if composed(keys, parameters) != method:
        raise RecipeError(
            f"no recipe composes the method {method.name!r} with these parts: {method}",
            remedy="register its parts under their names, and give one value to a parameter that "
            "several parts have; see CONTRIBUTING.md",
        )
    return {**keys, PARAMETERS: parameters}


def composed(keys: Mapping[str, Any], parameters: Mapping[str, Any]) -> Method | None:
    """The method that these keys compose; None if they are refused."""
    own = {key: value for key, value in keys.items() if key not in ("method", "pattern")}
    try:
        return compose(keys["method"], keys["pattern"], **own, **parameters)
    except (RecipeError, PatternError):
        return None
