"""Check the house rules that no linter checks: `make check` runs this.

    python tools/house_rules.py

1. A module has at most 420 lines.
2. A function has at most 60 lines, from `def` to its last line. Its docstring does not count.
3. No circle of imports, between modules or between rooms. Imports for type checkers count too.
4. No class name is used in two modules, unless `SHARED_CLASS_NAMES` gives a reason.

An exception that is no longer needed is a violation as well, so the lists below can only shrink.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from house_map import Arrows, all_circles, module_imports

MODULE_LINES = 420
FUNCTION_LINES = 60

SHARED_CLASS_NAMES: Mapping[str, str] = {
    "NOfM": "N of M as a sparsity pattern, and the packed format for exactly this pattern",
}

# Violations of the day these rules were written. Fix one, and delete its line. Add none.
TO_FIX: frozenset[str] = frozenset({})


class Module(NamedTuple):
    """A source file: its path below the source folder, its number of lines, and its syntax."""

    path: str
    lines: int
    tree: ast.Module


def modules(source: Path) -> list[Module]:
    """All modules below a folder, sorted by path."""
    found = []
    for file in sorted(source.rglob("*.py")):
        text = file.read_text(encoding="utf-8")
        path = file.relative_to(source).as_posix()
        found.append(Module(path, len(text.splitlines()), ast.parse(text)))
    return found


def code_lines(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """The lines of a function from `def` to its end, without those of its docstring."""
    first, last = function.lineno, function.end_lineno or function.lineno
    lines = last - first + 1
    if ast.get_docstring(function, clean=False) is not None:
        docstring = function.body[0]
        lines -= (docstring.end_lineno or docstring.lineno) - docstring.lineno + 1
    return lines


def long_modules(found: list[Module]) -> Iterator[tuple[str, str]]:
    """Violations of rule 1; each is the key of `TO_FIX` and what is wrong."""
    for module in found:
        if module.lines > MODULE_LINES:
            yield module.path, f"has {module.lines} lines, more than {MODULE_LINES}"


def long_functions(found: list[Module]) -> Iterator[tuple[str, str]]:
    """Violations of rule 2."""
    for module in found:
        for node in ast.walk(module.tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                lines = code_lines(node)
                if lines > FUNCTION_LINES:
                    text = f"has {lines} lines without docstring, more than {FUNCTION_LINES}"
                    yield f"{module.path}:{node.name}", text


def import_circles(imports: Arrows) -> Iterator[tuple[str, str]]:
    """Violations of rule 3."""
    for circle in all_circles(imports):
        yield " ".join(circle), "import each other in a circle"


def shared_class_names(
    found: list[Module], allowed: Mapping[str, str]
) -> Iterator[tuple[str, str]]:
    """Violations of rule 4, and entries of `allowed` that are not needed."""
    places: dict[str, list[str]] = {}
    for module in found:
        for node in ast.walk(module.tree):
            if isinstance(node, ast.ClassDef):
                places.setdefault(node.name, []).append(module.path)
    shared = {name: paths for name, paths in places.items() if len(set(paths)) > 1}
    for name, paths in sorted(shared.items()):
        if name not in allowed:
            yield f"class {name}", f"is defined in {', '.join(sorted(set(paths)))}"
    for name in sorted(set(allowed) - set(shared)):
        yield f"class {name}", "is in one module only: delete it from SHARED_CLASS_NAMES"


def violations(
    source: Path, allowed: Mapping[str, str] = SHARED_CLASS_NAMES, to_fix: frozenset[str] = TO_FIX
) -> list[str]:
    """One line for each violation below the folder `source`, apart from those in `to_fix`."""
    found = modules(source)
    broken = [
        *long_modules(found),
        *long_functions(found),
        *import_circles(module_imports(source)),
        *shared_class_names(found, allowed),
    ]
    lines = [f"{where}: {what}" for where, what in broken if where not in to_fix]
    fixed = sorted(to_fix - {where for where, _ in broken})
    return lines + [f"{where}: is fixed; delete it from TO_FIX" for where in fixed]


def main() -> None:
    """Print the violations of this working tree; the exit code is 1 if there are any."""
    lines = violations(Path(__file__).parent.parent / "src")
    if lines:
        print("\n".join(lines), file=sys.stderr)
        sys.exit(1)
    print(f"house rules: no violations, {len(TO_FIX)} to fix")


if __name__ == "__main__":
    main()
