"""`secateur methods`: what there is to choose from."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from secateur.cli import options as o

__all__ = ["methods"]


def methods(*, as_json: o.Json = False) -> None:
    """List presets, methods and their parts."""
    from secateur.cli.rendering import print_json, print_table
    from secateur.recipes.presets import presets
    from secateur.sparsity.methods import methods as known

    if as_json:
        print_json(everything())
        return
    print_table(
        "presets: secateur prune MODEL --effort NAME",
        ("name", "stands for"),
        [(name, ", ".join(f"{k}={told(v)}" for k, v in presets[name].items())) for name in presets],
        numbers=2,
    )
    print_table(
        "methods: secateur prune MODEL --method NAME",
        ("name", "score", "solver", "scope", "what it does", "paper"),
        [(name, m.score, m.solver, m.scope, m.description, m.paper) for name, m in known.items()],
        numbers=6,
    )
    show_training()
    show_parts()


def everything() -> dict[str, Any]:
    """All that can be chosen, as plain data."""
    from secateur.calibration.statistics import statistics
    from secateur.models.architecture import families
    from secateur.recipes.presets import presets
    from secateur.runtime.formats import formats
    from secateur.sparsity.allocation import allocations
    from secateur.sparsity.methods import methods as known
    from secateur.sparsity.patterns import patterns
    from secateur.sparsity.refinements import refinements
    from secateur.sparsity.schedules import schedules
    from secateur.sparsity.scores import scores
    from secateur.sparsity.solvers import solvers
    from secateur.training.methods import training_methods

    return {
        "methods": {name: entry.to_json() for name, entry in known.items()},
        "scores": {name: sorted(scores[name].requires) for name in scores},
        "solvers": {name: sorted(solvers[name].requires) for name in solvers},
        "refinements": {name: sorted(refinements[name].requires) for name in refinements},
        "patterns": {name: patterns[name].written for name in patterns},
        "allocations": allocations.names(),
        "schedules": schedules.names(),
        "training": {name: entry.to_json() for name, entry in training_methods.items()},
        "statistics": {name: statistics[name].reads for name in statistics},
        "formats": formats.names(),
        "families": {name: families[name].model_types for name in families},
        "presets": {name: dict(presets[name]) for name in presets},
    }


def show_parts() -> None:
    """The table of parts from which methods are composed."""
    from secateur.cli.rendering import print_table
    from secateur.sparsity.allocation import allocations
    from secateur.sparsity.patterns import patterns
    from secateur.sparsity.refinements import refinements
    from secateur.sparsity.schedules import schedules
    from secateur.sparsity.scores import scores
    from secateur.sparsity.solvers import solvers

    print_table(
        "parts: --score NAME --solver NAME --refine NAME --pattern TEXT --allocation NAME",
        ("kind", "name", "needs"),
        [
            *(("score", n, ", ".join(sorted(scores[n].requires)) or "weights") for n in scores),
            *(("solver", n, ", ".join(sorted(solvers[n].requires)) or "a mask") for n in solvers),
            *(("refinement", n, ", ".join(sorted(refinements[n].requires))) for n in refinements),
            *(("pattern", n, patterns[n].written) for n in patterns),
            *(("allocation", n, allocated(allocations[n])) for n in allocations),
            *(
                ("schedule", n, "--set gradual.schedule=NAME, iterative.schedule=NAME")
                for n in schedules
            ),
        ],
        numbers=3,
    )


def show_training() -> None:
    """The methods that train, and the command of each."""
    from secateur.cli.rendering import print_table
    from secateur.training.methods import training_methods

    print_table(
        "methods that train",
        ("name", "what it does", "paper"),
        [(name, m.description, m.paper) for name, m in training_methods.items()],
        numbers=3,
    )
    print_table(
        "their commands: add --output DIR, and --resume after a stop",
        ("name", "secateur"),
        [(n, m.command.removeprefix("secateur ")) for n, m in training_methods.items()],
        numbers=2,
    )


def told(value: Any) -> str:
    """A value of a recipe on one line."""
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{k}: {v}" for k, v in value.items()) + "}"
    return str(value).lower() if isinstance(value, bool) else str(value)


def allocated(kind: Any) -> str:
    """What an allocation needs, in words."""
    needs = [*sorted(kind.requires), *(f"the method's {part}" for part in sorted(kind.uses))]
    return ", ".join(needs) or "nothing"
