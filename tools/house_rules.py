"""Check the house rules that no linter checks: `make check` runs this.

    python tools/house_rules.py
    python tools/house_rules.py --lower
    python tools/house_rules.py --list neighbours        or twins, once, sentences

1. A module has at most 800 lines.
2. A function has at most 60 lines, from `def` to its last line. Its docstring does not count.
3. No circle of imports, between modules or between rooms. Imports for type checkers count too.
4. No class name is used in two modules, unless `SHARED_CLASS_NAMES` gives a reason.
5. No number of `RATCHETS` rises. `house_numbers.py` says how each is counted, and `recipe_path.py`
   how the run of a recipe is.

An exception that is no longer needed is a violation as well, so the lists below can only shrink.
Where a number has fallen, `--lower` writes it into `RATCHETS`. `--list` prints what is counted.
"""

from __future__ import annotations

import argparse
import ast
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from house_map import PACKAGE, Arrows, all_circles, module_imports
from house_numbers import (
    Module,
    named_once,
    neighbours,
    numbers,
    read_modules,
    sentences,
    sizes,
    twins,
    written_numbers,
)
from recipe_path import at_formula, tiny_run

HERE = Path(__file__)
MODULE_LINES = 800
FUNCTION_LINES = 60

SHARED_CLASS_NAMES: Mapping[str, str] = {
    "NOfM": "N of M as a sparsity pattern, and the packed format for exactly this pattern",
}

# Violations of the day these rules were written. Fix one, and delete its line. Add none.
TO_FIX: frozenset[str] = frozenset({})

RATCHETS: Mapping[str, float] = {
    "source files": 339,
    "modules that only their neighbour imports": 12,
    "pairs of classes with five equal fields": 4,
    "percent of lines that import": 6.1,
    "lines of statements": 44411,
    "functions named in one place": 437,
    "files from the command line to Wanda's formula": 45,
    "frames from the command line to Wanda's formula": 10,
    "moves from the command line to Wanda's formula": 18,
    "words of documentation": 76654,
    "lines of tests": 62066,
    "sentences that tests compare": 47,
    "names of options": 176,
}
"""The most that each number may be."""


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
    found: list[Module],
    imports: Arrows,
    allowed: Mapping[str, str] = SHARED_CLASS_NAMES,
    to_fix: frozenset[str] = TO_FIX,
) -> list[str]:
    """One line for each violation of rules 1 to 4, apart from those in `to_fix`."""
    broken = [
        *long_modules(found),
        *long_functions(found),
        *import_circles(imports),
        *shared_class_names(found, allowed),
    ]
    lines = [f"{where}: {what}" for where, what in broken if where not in to_fix]
    fixed = sorted(to_fix - {where for where, _ in broken})
    return lines + [f"{where}: is fixed; delete it from TO_FIX" for where in fixed]


def risen(today: Mapping[str, float], most: Mapping[str, float] = RATCHETS) -> list[str]:
    """One line for each violation of rule 5."""
    return [
        f"{name}: {number}, more than {most[name]}"
        for name, number in today.items()
        if number > most[name]
    ]


def table(today: Mapping[str, float], most: Mapping[str, float] = RATCHETS) -> str:
    """The numbers and the most that each may be."""
    wide = max(map(len, today))
    lines = [f"{'':{wide}}   today  at most"]
    for name, number in today.items():
        hint = f"   lower the ratchet to {number}: --lower" if number < most[name] else ""
        lines.append(f"{name:{wide}} {number:>7} {most[name]:>8}{hint}")
    return "\n".join(lines)


def lower(file: Path, today: Mapping[str, float]) -> list[str]:
    """Write the numbers that have fallen into the `RATCHETS` of a file; return their names."""
    text, fallen = file.read_text(encoding="utf-8"), []
    for name, number in today.items():
        entry = re.compile(rf'(?<=^    "{re.escape(name)}": )[\d.]+(?=,$)', re.MULTILINE)
        written = entry.search(text)
        if written and number < float(written[0]):
            text = entry.sub(str(number), text)
            fallen.append(name)
    file.write_text(text, encoding="utf-8")
    return fallen


def listed(kind: str, found: list[Module], imports: Arrows, tests: list[Module]) -> str:
    """What the number of a kind counts, a line each."""
    kinds: Mapping[str, Callable[[], list[Any]]] = {
        "neighbours": lambda: neighbours(found, imports),
        "twins": lambda: twins(found),
        "once": lambda: named_once(found),
        "sentences": lambda: sentences(tests),
    }
    return "\n".join(map(str, kinds[kind]()))


def option_names() -> int:
    """How many names the options of all verbs have together."""
    from secateur.recipes.options import options_of, run_options_of
    from secateur.recipes.verbs import VERBS, imported

    recipes = [imported(verb.recipe) for verb in VERBS.values() if verb.recipe]
    every = [(*options_of(recipe), *run_options_of(recipe)) for recipe in recipes]
    return len({option.name for options in every for option in options})


def distance_of_a_formula(tree: Path) -> dict[str, float]:
    """The numbers of a house for which a recipe has to run."""
    with tiny_run(tree) as command:
        wanda = at_formula(command, tree / "src" / PACKAGE)
    return {
        "files from the command line to Wanda's formula": wanda.files,
        "frames from the command line to Wanda's formula": wanda.frames,
        "moves from the command line to Wanda's formula": wanda.moves,
    }


def main() -> None:
    """Print numbers and violations of this working tree; the exit code is 1 if a rule is broken."""
    parser = argparse.ArgumentParser(description="Check the house rules.")
    parser.add_argument("--lower", action="store_true", help="write the numbers that have fallen")
    parser.add_argument("--list", choices=("neighbours", "twins", "once", "sentences"))
    chosen = parser.parse_args()
    tree = HERE.resolve().parent.parent
    found, imports = read_modules(tree / "src"), module_imports(tree / "src")
    tests = read_modules(tree / "tests")
    if chosen.list:
        print(listed(chosen.list, found, imports, tests))
        return
    broken = violations(found, imports)
    print("".join(f"{line}\n" for line in broken), file=sys.stderr, end="", flush=True)
    today = numbers(found, imports) | distance_of_a_formula(tree) | written_numbers(tree, tests)
    today["names of options"] = option_names()
    if chosen.lower:
        print("\n".join(lower(HERE, today)) or "no number has fallen")
        return
    print(table(today))
    median, long = sizes(found)
    print(f"lines of a module: median {median}, nine of ten have at most {long}")
    more = risen(today)
    print("".join(f"{line}\n" for line in more), file=sys.stderr, end="")
    if broken or more:
        sys.exit(1)
    print(f"house rules: no violations, {len(TO_FIX)} to fix")


if __name__ == "__main__":
    main()
