"""`secateur methods`: the presets, the methods and their parts."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from secateur.calibration.statistics import statistics
from secateur.models.architecture import families
from secateur.progress import Progress
from secateur.recipes.prune import MethodsRecipe, presets
from secateur.reporting.fields import Result, blocks_of
from secateur.reporting.tables import Block
from secateur.runtime.formats import formats
from secateur.sparsity.allocation import allocations
from secateur.sparsity.methods import methods as named
from secateur.sparsity.patterns import patterns
from secateur.sparsity.refinements import refinements
from secateur.sparsity.schedules import schedules
from secateur.sparsity.scores import scores
from secateur.sparsity.solvers import solvers
from secateur.training.methods import training_methods


def methods() -> MethodsResult:
    """All presets, methods and their parts, with what each needs."""
    return MethodsResult(presets={name: dict(presets[name]) for name in presets})


def list_methods(recipe: MethodsRecipe, progress: Progress) -> MethodsResult:
    """Carry out a recipe, which has no options."""
    return methods()


class MethodsResult(Result):
    """Everything that can be named in a recipe.

    Attributes:
        presets: the recipe keys that each preset sets.
    """

    presets: dict[str, dict[str, Any]]

    def to_json(self) -> dict[str, Any]:
        """All choices, by kind and name."""
        return {
            "methods": {name: entry._asdict() for name, entry in named.items()},
            "scores": {name: sorted(scores[name].requires) for name in scores},
            "solvers": {name: sorted(solvers[name].requires) for name in solvers},
            "refinements": {name: sorted(refinements[name].requires) for name in refinements},
            "patterns": {name: patterns[name].written for name in patterns},
            "allocations": allocations.names(),
            "schedules": schedules.names(),
            "training": {name: entry._asdict() for name, entry in training_methods.items()},
            "statistics": {name: statistics[name].source.name for name in statistics},
            "formats": formats.names(),
            "families": {name: families[name].model_types for name in families},
            "presets": self.presets,
        }

    def tables(self) -> list[Block]:
        """Presets, methods, training methods and parts."""
        return blocks_of(
            "MethodsResult",
            self,
            stands_for=[
                (name, [f"{key}={_format_value(value)}" for key, value in keys.items()])
                for name, keys in self.presets.items()
            ],
            named=[*named.items()],
            training=[*training_methods.items()],
            parts=[*_parts()],
        )


def _parts() -> Iterable[tuple[str, str, str]]:
    """The parts of methods: kind, name, and what each one needs."""
    kinds: list[tuple[str, Any, str]] = [
        ("score", scores, "weights"), ("solver", solvers, "a mask"),
        ("refinement", refinements, ""),
    ]  # fmt: skip
    for kind, registry, nothing in kinds:
        yield from ((kind, n, ", ".join(sorted(registry[n].requires)) or nothing) for n in registry)
    yield from (("pattern", n, patterns[n].written) for n in patterns)
    for name in allocations:
        needs, uses = sorted(allocations[name].requires), sorted(allocations[name].uses)
        words = [*needs, *(f"the method's {part}" for part in uses)]
        yield "allocation", name, ", ".join(words) or "nothing"
    own = "--set gradual.schedule=NAME, iterative.schedule=NAME"
    yield from (("schedule", n, own) for n in schedules)


def _format_value(value: Any) -> str:
    """A recipe value as one line of text."""
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{k}: {v}" for k, v in value.items()) + "}"
    return str(value).lower() if isinstance(value, bool) else str(value)
