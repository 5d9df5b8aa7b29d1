"""`secateur methods`: the presets, the methods and their parts."""

from __future__ import annotations

from secateur.recipes.presets import presets
from secateur.reporting.plan import MethodsResult


def methods() -> MethodsResult:
    """All presets, methods and their parts, with what each needs."""
    return MethodsResult({name: presets[name] for name in presets})
