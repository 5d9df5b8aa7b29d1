"""The examples in docstrings are run: each one stands by itself and shows the numbers it gives."""

from __future__ import annotations

import ast
import doctest
from collections.abc import Iterator
from pathlib import Path

import pytest

from secateur.calibration.statistics import statistics
from secateur.sparsity.patterns import patterns
from secateur.sparsity.refinements import refinements
from secateur.sparsity.schedules import schedules
from secateur.sparsity.scores import scores
from secateur.sparsity.solvers import solvers

SOURCE = Path(__file__).parents[1] / "src"
REGISTRIES = (scores, patterns, refinements, solvers, schedules, statistics)


def documented(node: ast.AST, name: str) -> Iterator[tuple[str, str]]:
    """Every docstring below a node that has an example: the name of its owner, and the text."""
    if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
        text = ast.get_docstring(node)
        if text is not None and ">>> " in text:
            yield name, text
        for child in node.body:
            yield from documented(child, f"{name}.{getattr(child, 'name', '')}")


def examples() -> list[tuple[str, str]]:
    """All examples of the library; read from the source, so nothing is imported."""
    found: list[tuple[str, str]] = []
    for file in sorted(SOURCE.rglob("*.py")):
        text = file.read_text(encoding="utf-8")
        if ">>> " in text:
            module = ".".join(file.relative_to(SOURCE).with_suffix("").parts)
            found += documented(ast.parse(text), module.removesuffix(".__init__"))
    return found


@pytest.mark.parametrize(("name", "text"), examples(), ids=lambda value: value.split("\n")[0])
def test_the_example_gives_what_it_shows(name: str, text: str) -> None:
    test = doctest.DocTestParser().get_doctest(text, {}, name, None, None)
    report: list[str] = []
    results = doctest.DocTestRunner(verbose=False).run(test, out=report.append)
    assert results.attempted > 0
    assert results.failed == 0, "".join(report)


def test_every_part_shows_an_example() -> None:
    shown = {name for name, _ in examples()}
    parts = [registry[name] for registry in REGISTRIES for name in registry.names()]
    ours = [f"{part.__module__}.{part.__name__}" for part in parts]
    assert [name for name in ours if name.startswith("secateur.") and name not in shown] == []
