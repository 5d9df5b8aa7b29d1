"""Presets trade time for quality.

A preset fills in the options that a recipe leaves open. Values in the recipe stay.
`benchmarks/presets.py` measures what each preset brings and costs; docs/methods/presets.md shows
the results.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

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
            "distillation": {"epochs": 1, "next_token": 0.5, "tokens": 262_144},
        },
    }
)
"""The recipe values of each effort."""

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
            "distillation": {"epochs": 1, "next_token": 0.5, "tokens": 262_144},
        },
    }
)
"""The recipe values of each effort, for structured cuts."""

_COMPOSITION = {"method", "score", "solver", "refine"}
"""Values that only make sense together. If the recipe has one of them, the preset sets none, and no
parameters either. Parameters alone are added to those of the preset."""


def filled_in(
    values: Mapping[str, Any], known: Mapping[str, Mapping[str, Any]] = presets
) -> dict[str, Any]:
    """Add the values of the preset that a recipe does not have itself.

    Without an effort, method, score, solver or learned masks, the effort is `balanced`. An unknown
    effort adds nothing; the recipe refuses it.

    Args:
        values: the values of the recipe.
        known: the presets of this kind of recipe.
    """
    given = {key: value for key, value in values.items() if value is not None}
    composed = _COMPOSITION & given.keys()
    effort = given.get("effort")
    if effort is None:
        if composed & {"method", "score", "solver"} or "learned" in given:
            return given
        effort = DEFAULT_EFFORT
    preset = known.get(effort, {}) if isinstance(effort, str) else {}
    for key, value in preset.items():
        if composed and key in _COMPOSITION | {"method_parameters"}:
            continue
        if isinstance(value, Mapping) and isinstance(given.get(key, {}), Mapping):
            given[key] = {**value, **given.get(key, {})}
        else:
            given.setdefault(key, value)
    return {**given, "effort": effort}
