"""`secateur methods`: the presets, the methods and their parts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from secateur.calibration.statistics import statistics
from secateur.models.architecture import families
from secateur.recipes.prune import presets
from secateur.reporting.tables import Block, Result, Table
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
    return MethodsResult({name: presets[name] for name in presets})


@dataclass(frozen=True, repr=False)
class MethodsResult(Result):
    """Everything that can be named in a recipe.

    Attributes:
        presets: the recipe keys that each preset sets.
    """

    presets: Mapping[str, Mapping[str, Any]]

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
            "presets": {name: dict(keys) for name, keys in self.presets.items()},
        }

    def blocks(self) -> Sequence[Block]:
        """Presets, methods, training methods and parts."""
        stands_for = [
            (name, ", ".join(f"{key}={_format_value(value)}" for key, value in keys.items()))
            for name, keys in self.presets.items()
        ]
        rows = [(n, m.score, m.solver, m.scope, m.description, m.paper) for n, m in named.items()]
        columns = ("name", "score", "solver", "scope", "what it does", "paper")
        title = "presets: secateur prune MODEL --effort NAME"
        return [
            Table.of(title, ("name", "stands for"), stands_for, numbers=2),
            Table.of("methods: secateur prune MODEL --method NAME", columns, rows, numbers=6),
            *_training_tables(),
            _part_table(),
        ]


def _training_tables() -> list[Table]:
    """The methods that train, with their commands."""
    rows = [(name, m.description, m.paper) for name, m in training_methods.items()]
    commands = [(n, m.command.removeprefix("secateur ")) for n, m in training_methods.items()]
    title = "their commands: add --output DIR, and --resume after a stop"
    return [
        Table.of("methods that train", ("name", "what it does", "paper"), rows, numbers=3),
        Table.of(title, ("name", "secateur"), commands, numbers=2),
    ]


def _part_table() -> Table:
    """The parts of methods, and what each one needs."""
    needs = {
        n: [
            *sorted(allocations[n].requires),
            *(f"the method's {part}" for part in sorted(allocations[n].uses)),
        ]
        for n in allocations
    }
    rows = [
        *(("score", n, ", ".join(sorted(scores[n].requires)) or "weights") for n in scores),
        *(("solver", n, ", ".join(sorted(solvers[n].requires)) or "a mask") for n in solvers),
        *(("refinement", n, ", ".join(sorted(refinements[n].requires))) for n in refinements),
        *(("pattern", n, patterns[n].written) for n in patterns),
        *(("allocation", n, ", ".join(words) or "nothing") for n, words in needs.items()),
        *(
            ("schedule", n, "--set gradual.schedule=NAME, iterative.schedule=NAME")
            for n in schedules
        ),
    ]
    title = "parts: --score NAME --solver NAME --refine NAME --pattern TEXT --allocation NAME"
    return Table.of(title, ("kind", "name", "needs"), rows, numbers=3)


def _format_value(value: Any) -> str:
    """A recipe value as one line of text."""
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{k}: {v}" for k, v in value.items()) + "}"
    return str(value).lower() if isinstance(value, bool) else str(value)
