"""Patterns of every registered kind, with matrices that fit them."""

from __future__ import annotations

from secateur.sparsity.patterns import Pattern, parse_pattern

EXAMPLES: dict[str, list[tuple[str, str | None]]] = {
    "unstructured": [("unstructured", scope) for scope in ("row", "layer", "global")],
    "n:m": [(text, None) for text in ("2:4", "4:8", "1:4", "8:16", "3:5")],
    "whole-columns": [("*x1", None), ("*x8", None), ("*x4/2", None), ("*x4@3", None)],
    "block": [
        ("16x1", None),
        ("32x32", None),
        ("4x2", None),
        ("1x8", "global"),
    ],
}
ALL = [(text, scope) for texts in EXAMPLES.values() for text, scope in texts]


def fitting_shape(text: str) -> tuple[int, int]:
    """An odd shape, or an odd number of groups or blocks."""
    if ":" in text:
        return 7, 9 * int(text.split(":")[1])
    if text.startswith("*x"):
        width, _, together = text.removeprefix("*x").replace("@", "/").partition("/")
        return 7, 9 * int(width) * int(together or 1)
    if "x" in text:
        rows, columns = map(int, text.split("x"))
        return 3 * rows, columns * max(3, 27 // columns | 1)
    return 7, 37


def sparsities(pattern: Pattern) -> list[float]:
    """What to ask of it: the least, the most, and something that does not come out even."""
    return [0.0, 0.37, 0.5, 0.99] if pattern.sparsity is None else [pattern.sparsity]


def parsed(text: str, scope: str | None) -> Pattern:
    return parse_pattern(text, scope)


def solved_by(solver, case, pattern, sparsity, mask=None):
    """The solution for a mask, or for the one that the solver chooses."""
    prepared = solver.prepare(case.statistics)
    if mask is None:
        return solver.choose(case.weight, prepared, pattern, sparsity)
    return solver.solve(case.weight, prepared, mask)
