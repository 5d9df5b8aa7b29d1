"""`secateur methods`: what there is to choose from."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from secateur.cli import options as o

__all__ = ["methods"]


def methods(as_json: o.Json = False) -> None:
    """List presets, methods and their parts."""
    from secateur.cli.rendering import print_json
    from secateur.recipes.presets import presets
    from secateur.reporting.tables import Table, print_blocks
    from secateur.sparsity.allocation import allocations
    from secateur.sparsity.methods import methods as known
    from secateur.sparsity.patterns import patterns
    from secateur.sparsity.refinements import refinements
    from secateur.sparsity.schedules import schedules
    from secateur.sparsity.scores import scores
    from secateur.sparsity.solvers import solvers

    if as_json:
        print_json(
            {
                "methods": {name: entry.to_json() for name, entry in known.items()},
                "scores": {name: sorted(scores[name].requires) for name in scores},
                "solvers": {name: sorted(solvers[name].requires) for name in solvers},
                "refinements": {n: sorted(refinements[n].requires) for n in refinements},
                "patterns": patterns.names(),
                "allocations": allocations.names(),
                "schedules": schedules.names(),
                "presets": {name: dict(presets[name]) for name in presets},
            }
        )
        return
    tables = [
        Table.of(
            "presets: secateur prune MODEL --effort NAME",
            ("name", "stands for"),
            [
                (name, ", ".join(f"{k}={told(v)}" for k, v in presets[name].items()))
                for name in presets
            ],
            numbers=2,
        ),
        Table.of(
            "methods: secateur prune MODEL --method NAME",
            ("name", "score", "solver", "scope", "what it does", "paper"),
            [
                (name, m.score, m.solver, m.scope, m.description, m.paper)
                for name, m in known.items()
            ],
            numbers=6,
        ),
        Table.of(
            "parts: --score NAME --solver NAME --refine NAME --pattern TEXT --allocation NAME",
            ("kind", "name", "needs"),
            [
                *(("score", n, ", ".join(sorted(scores[n].requires)) or "weights") for n in scores),
                *(
                    ("solver", n, ", ".join(sorted(solvers[n].requires)) or "a mask")
                    for n in solvers
                ),
                *(
                    ("refinement", n, ", ".join(sorted(refinements[n].requires)))
                    for n in refinements
                ),
                ("pattern", "unstructured", "scope row, layer or global"),
                ("pattern", "N:M", "N kept of M, for example 2:4, 4:8, 1:4, 8:16"),
                ("pattern", "ROWSxCOLUMNS", "blocks, for example 16x1, 32x32"),
                *(("allocation", n, allocated(allocations[n])) for n in allocations),
                *(("schedule", n, "retrain --gradual, --set gradual.schedule") for n in schedules),
            ],
            numbers=3,
        ),
    ]
    print_blocks(tables)


def told(value: Any) -> str:
    """A value of a recipe on one line."""
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{k}: {v}" for k, v in value.items()) + "}"
    return str(value).lower() if isinstance(value, bool) else str(value)


def allocated(kind: Any) -> str:
    """What an allocation needs, in words."""
    needs = [*sorted(kind.requires), *(f"the method's {part}" for part in sorted(kind.uses))]
    return ", ".join(needs) or "nothing"
