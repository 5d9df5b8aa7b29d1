"""What solving takes: memory for one linear, fallbacks included, and work that goes on for hours.

A matrix that float32 cannot factorise is factorised in float64. Whether that will happen is not
known beforehand, so the memory for it is counted. `tests/engine/test_solver_cost.py` measures
every solver against these numbers, on grams that need the float64 and on grams that do not.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping

from secateur.sparsity.hessian import FACTOR_SQUARES
from secateur.sparsity.methods import Method
from secateur.sparsity.solvers.least_squares import systems_bytes

__all__ = ["solve_bytes", "solve_squares", "warn_of_work"]

log = logging.getLogger(__name__)

MUCH_WORK = 1e14
"""Floating-point operations that take a processor at 100 GFLOP/s a quarter of an hour."""

SOLVE_COPIES = {"zero": 4, "obs": 7, "alps": 9}
"""Float32 copies of the largest weight at the height of scoring, masking and solving, measured."""

SOLVE_SQUARES = {"alps": 10}
"""Float32 matrices [in, in] at the same time, where float32 is not enough and float64 is tried:
with ALPS the gram, A, the sum of inverses, three of them, and 4 for the last in the making; with
all others those of `inverse_factor`."""


def solve_bytes(method: Method, shapes: list[tuple[int, int]], asymmetric: bool) -> int:
    """Statistics, scores, masks and solver of the largest linear."""
    solve = SOLVE_COPIES.get(method.solver_name, 7) * 4 * max(o * i for o, i in shapes)
    solve += 4 * solve_squares(method, asymmetric) * max(i for _, i in shapes) ** 2
    if method.solver_name in ("least-squares", "osscar"):
        solve += max(systems_bytes(*shape) for shape in shapes)
    return solve


def solve_squares(method: Method, asymmetric: bool) -> int:
    """Float32 matrices [in, in] at the same time; asymmetric fitting has two more to fit to."""
    if "gram" not in method.requires and not asymmetric:
        return 0
    return SOLVE_SQUARES.get(method.solver_name, FACTOR_SQUARES) + 2 * asymmetric


def warn_of_work(
    shapes: Mapping[str, tuple[int, int]],
    sparsity_of: Mapping[str, float],
    method_for: Callable[[str], Method],
) -> None:
    """Say beforehand that a solver will take very long, where it can tell how long (`flops`).

    Args:
        shapes: (out, in) of every linear, by name.
        sparsity_of: how much each loses.
        method_for: the method of a linear.
    """
    total = 0.0
    for name, shape in shapes.items():
        method, sparsity = method_for(name), sparsity_of[name]
        flops = getattr(method.solver, "flops", None)
        if flops is not None and sparsity > 0:
            total += flops(shape, method.pattern, sparsity)
    if total > MUCH_WORK:
        log.warning(
            "the solver %r will take about %.2g floating-point operations for this model, %.2g "
            "hours at 100 GFLOP/s, since each row of a weight has zeros of its own; the solver "
            "'admm' comes within a few percent for one factorisation an input",
            method_for(next(iter(shapes))).solver_name,
            total,
            total / 1e11 / 3600,
        )
