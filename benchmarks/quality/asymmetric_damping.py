"""Which damping the solvers need after an asymmetric fit: the fit's own, or their usual one.

    python -m benchmarks.quality.asymmetric_damping [--layers 8] [--windows 48]

The first layers of SmolLM2-135M as the effort `balanced` prunes them, with one sparsity for all
linears. `fit` is λ of W* = (TX̂ᵀ + λW)(G + λI)⁻¹, as a fraction of the mean diagonal of G, and
`solver` the damping with which W* is then pruned. With equal numbers, what is solved is
‖T − ŴX̂‖² + λ‖W − Ŵ‖². Every linear that writes to the residual stream is pruned in each way from
three quarters of the tokens, and ‖T − ŴX̂‖² / ‖T‖² is measured on the other quarter.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.hardware import heading, keep, markdown
from torch import Tensor

import secateur
from secateur.engine.prune import asymmetric
from secateur.engine.prune.tasks import LinearTask
from secateur.evaluation.uncertainty import mean_of, standard_error
from secateur.models.architecture import Linear
from secateur.types import STORED

MEASURES = ("src/secateur/engine/prune", "src/secateur/sparsity/solvers")

DAMPINGS = ((0.2, 0.01), (0.2, 0.2), (0.05, 0.05), (0.01, 0.01))
"""λ of the fit, and of the solver."""


class Compared:
    """Stands in for the choice of a damping: measures every pair, and takes the usual one."""

    def __init__(self) -> None:
        self.errors: list[list[float]] = []

    def __call__(
        self,
        statistics: asymmetric.HeldOutStatistics,
        linears: Sequence[Linear],
        tasks: Mapping[str, LinearTask],
        own: Callable[[Linear], Mapping[str, Tensor]],
        writer: bool,
    ) -> dict[str, float]:
        """Prune in each way; arguments as of `choose_dampings`."""
        (linear,), task = linears, tasks[linears[0].name]
        fit, held = statistics.copied(), statistics.held.copied()
        shared, gram, cross = fit.value(), held.value()["gram"], held.cross.value()
        known = {**shared, **fit.own(linear), **own(linear), STORED: linear.weight}
        errors = []
        for damping, of_solver in DAMPINGS:
            solver: Any = task.method.solver
            method = replace(task.method, solver=replace(solver, damping=of_solver))
            target = fit.fitted(writer, damping)(linear)
            prepared = method.solver.prepare(shared)
            weight = method.solve(target, prepared, known, task.sparsity).weight
            inner = (weight @ gram).sub_(cross, alpha=2.0)
            errors.append(1 + float((inner * weight).sum()) / held.cross.energy)
        self.errors.append(errors)
        print(linear.name, [f"{error:.4f}" for error in errors], flush=True)
        return {linear.name: DAMPINGS[0][0]}


class CrossGramWithEnergy(asymmetric.CrossGram):
    """Also ‖T‖²."""

    energy = 0.0

    def update(self, target: Tensor, x: Tensor) -> None:
        """Add T and x̂ of the same tokens."""
        super().update(target, x)
        self.energy += float(target.double().square().sum())


def main() -> None:
    """Prune, measuring every pair of dampings, and compare."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--windows", type=int, default=48)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--sparsity", type=float, default=0.5)
    args = parser.parse_args()
    print(heading(), flush=True)
    compared = Compared()
    asymmetric.choose_dampings, asymmetric.CrossGram = compared, CrossGramWithEnergy  # type: ignore
    with tempfile.TemporaryDirectory() as place:
        secateur.prune(
            args.model,
            output=Path(place) / "pruned",
            include=[f"model.layers.{layer}.*" for layer in range(args.layers)],
            sparsity=args.sparsity,
            effort="balanced",
            allocation="uniform",
            calibration="boolq-calibration",
            windows=args.windows,
            sequence_length=args.length,
            choose_damping=True,
        )
    rows, first = [], [errors[0] for errors in compared.errors]
    for number, (fit, solver) in enumerate(DAMPINGS):
        ratios = [errors[number] / one for errors, one in zip(compared.errors, first, strict=True)]
        rows.append({
            "fit": fit, "solver": solver, "linears": len(ratios),
            "error": mean_of([errors[number] for errors in compared.errors]),
            "over_first": mean_of(ratios),
            "over_first_error": standard_error(ratios) if number else 0.0,
            "smaller_than_first": sum(ratio < 1 for ratio in ratios),
        })  # fmt: skip
    print(f"written to {keep('asymmetric-damping', vars(args), rows)}")
    lines = []
    for row in rows:
        beside = f"{row['over_first']:.4f} ± {row['over_first_error']:.4f}"
        wins = f"{row['smaller_than_first']} of {row['linears']}"
        lines.append([f"{row['fit']:g}", f"{row['solver']:g}", f"{row['error']:.4f}", beside, wins])
    print(
        markdown(["λ of the fit", "of the solver", "error", "over the first row", "smaller"], lines)
    )


if __name__ == "__main__":
    main()
