"""Presets: how long to wait for how good a result.

A preset fills in what a recipe leaves open; whatever is given keeps its value. What each brings
and costs is measured in `benchmarks/presets.py`, and told in docs/methods/presets.md.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from secateur.errors import RecipeError
from secateur.registry import did_you_mean

__all__ = ["DEFAULT_EFFORT", "filled_in", "presets", "structure_presets"]

DEFAULT_EFFORT = "balanced"

presets: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "fast": {"method": "sparsegpt", "fast_matmuls": True},
        "balanced": {
            "method": "alps",
            "method_parameters": {"iterations": 15, "growth": 1.6},
            "asymmetric": True,
            "fast_matmuls": True,
        },
        "best": {
            "method": "alps",
            "method_parameters": {"iterations": 30, "growth": 1.3},
            "asymmetric": True,
            "fast_matmuls": True,
            "calibration": {"generated_windows": 128},
            "distillation": {"epochs": 1, "next_token": 0.5},
        },
    }
)
"""What each effort stands for, as values of a recipe."""

structure_presets: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "fast": {
            "score": "wanda",
            "solver": "least-squares",
            "fast_matmuls": True,
        },
        "balanced": {
            "score": "wanda",
            "solver": "alps",
            "method_parameters": {"iterations": 15, "growth": 1.6},
            "asymmetric": True,
            "fast_matmuls": True,
        },
        "best": {
            "score": "wanda",
            "solver": "alps",
            "method_parameters": {"iterations": 30, "growth": 1.3},
            "asymmetric": True,
            "fast_matmuls": True,
            "calibration": {"generated_windows": 256},
            "distillation": {"epochs": 1, "next_token": 0.5},
        },
    }
)
"""The same for structured cuts."""

_COMPOSITION = {"method", "score", "solver", "refine", "method_parameters"}
"""Values that only make sense together: one that is given keeps a preset from the others."""


def filled_in(
    values: Mapping[str, Any], known: Mapping[str, Mapping[str, Any]] = presets
) -> dict[str, Any]:
    """The values of a recipe, with those of its preset where it is silent.

    With no effort, method, score, solver or learned masks, the effort is `balanced`.

    Args:
        values: of the recipe.
        known: the presets of this kind of recipe.

    Raises:
        RecipeError: there is no such effort.
    """
    given = {key: value for key, value in values.items() if value is not None}
    composed = _COMPOSITION & given.keys()
    effort = given.get("effort")
    if effort is None:
        if composed & {"method", "score", "solver"} or "learned" in given:
            return given
        effort = DEFAULT_EFFORT
    if effort not in known:
        raise RecipeError(f"unknown effort {effort!r}", remedy=did_you_mean(effort, [*known]))
    for key, value in known[effort].items():
        if composed and key in _COMPOSITION:
            continue
        if isinstance(value, Mapping) and isinstance(given.get(key, {}), Mapping):
            given[key] = {**value, **given.get(key, {})}
        else:
            given.setdefault(key, value)
    return {**given, "effort": effort}
