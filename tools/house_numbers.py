"""Count what makes a house large: `house_rules.py` keeps each of these numbers from rising.

- A neighbour is a module that exactly one module imports, and that one is in the same folder. A
  package's `__init__` is neither, and the modules that a `Registry` imports do not count.
- Twins are two classes with five or more fields of the same name. A field is an annotated name in
  the body of the class. A class and its subclass are no twins, and a protocol has none.
- A function is named once if its name stands in one place outside its own lines, as a name or an
  attribute. Imports do not count, and underscores at the start make no other name. Only functions
  of modules count, not methods.
- A statement line is not blank, and is no part of a comment, docstring, import or `__all__`.
- A test compares a sentence where a `match=`, or a string in an `assert`, has four words in a row.
"""

from __future__ import annotations

import ast
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from itertools import combinations
from pathlib import Path
from statistics import quantiles
from typing import NamedTuple

from house_map import Arrows

TWIN_FIELDS = 5
SENTENCE = re.compile(r"[a-z]{2,}(?:[,;:]? [a-z]{2,}){3}", re.IGNORECASE)
SHORTEST = 5
"""The lines of the shortest file that counts in `sizes`; shorter ones are empty packages."""

Definition = ast.FunctionDef | ast.AsyncFunctionDef


class Module(NamedTuple):
    """A source file: its path below the source folder, its text, and its syntax."""

    path: str
    text: list[str]
    tree: ast.Module

    @property
    def lines(self) -> int:
        """The number of lines."""
        return len(self.text)

    @property
    def is_package(self) -> bool:
        """Whether it is the `__init__` of a package."""
        return self.path.endswith("__init__.py")

    @property
    def name(self) -> str:
        """The name by which others import it."""
        return self.path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def read_modules(source: Path) -> list[Module]:
    """All modules below a folder, sorted by path."""
    found = []
    for file in sorted(source.rglob("*.py")):
        text = file.read_text(encoding="utf-8")
        path = file.relative_to(source).as_posix()
        found.append(Module(path, text.splitlines(), ast.parse(text)))
    return found


class Neighbour(NamedTuple):
    """A module that only its neighbour imports."""

    module: Module
    importer: Module

    def __str__(self) -> str:
        """Both modules with their lines."""
        one, other = self
        return f"{one.path} ({one.lines}) <- {other.path} ({other.lines})"


def registered_packages(modules: list[Module]) -> set[str]:
    """The packages whose modules a `Registry` imports: its second argument names them."""
    found = set()
    for module in modules:
        for node in ast.walk(module.tree):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "Registry":
                package = node.args[1]
                if isinstance(package, ast.Constant):
                    found.add(str(package.value))
                elif isinstance(package, ast.Name) and package.id == "__name__":
                    found.add(module.name)
    return found


def neighbours(modules: list[Module], imports: Arrows) -> list[Neighbour]:
    """The modules that only their neighbour imports, sorted by name."""
    importers: dict[str, set[str]] = defaultdict(set)
    for importer, imported in imports.items():
        for name in imported:
            importers[name].add(importer)
    registered = registered_packages(modules)
    by_name = {module.name: module for module in modules if not module.is_package}
    found = []
    for name in sorted(imports):
        package = name.rpartition(".")[0]
        if name not in by_name or package in registered or len(importers[name]) != 1:
            continue
        (importer,) = importers[name]
        if importer in by_name and importer.rpartition(".")[0] == package:
            found.append(Neighbour(by_name[name], by_name[importer]))
    return found


class Fields(NamedTuple):
    """A class with the names of its own fields and of its bases."""

    name: str
    path: str
    fields: frozenset[str]
    bases: frozenset[str]


class Twins(NamedTuple):
    """Two classes with many fields of the same name."""

    one: Fields
    other: Fields
    shared: list[str]

    def __str__(self) -> str:
        """Both classes with their files and the names of the shared fields."""
        places = " ~ ".join(f"{x.name} ({x.path})" for x in (self.one, self.other))
        return f"{places}: {len(self.shared)} of {', '.join(self.shared)}"


def classes(modules: list[Module]) -> Iterator[Fields]:
    """All classes that are no protocols."""
    for module in modules:
        for node in ast.walk(module.tree):
            if not isinstance(node, ast.ClassDef):
                continue
            bases = {ast.unparse(base).partition("[")[0].rpartition(".")[2] for base in node.bases}
            names = {
                line.target.id
                for line in node.body
                if isinstance(line, ast.AnnAssign)
                and isinstance(line.target, ast.Name)
                and "ClassVar" not in ast.unparse(line.annotation)
            }
            if "Protocol" not in bases:
                yield Fields(node.name, module.path, frozenset(names), frozenset(bases))


def twins(modules: list[Module]) -> list[Twins]:
    """The pairs of classes with at least `TWIN_FIELDS` fields of the same name."""
    every = list(classes(modules))
    bases: dict[str, frozenset[str]] = {}
    for entry in every:
        bases[entry.name] = bases.get(entry.name, frozenset()) | entry.bases
    found = []
    for one, other in combinations(every, 2):
        shared = one.fields & other.fields
        if len(shared) < TWIN_FIELDS:
            continue
        if one.name not in _all_bases(other, bases) and other.name not in _all_bases(one, bases):
            found.append(Twins(one, other, sorted(shared)))
    return found


def _all_bases(entry: Fields, bases: Mapping[str, frozenset[str]]) -> set[str]:
    seen: set[str] = set()
    waiting = set(entry.bases)
    while waiting:
        name = waiting.pop()
        seen.add(name)
        waiting |= bases.get(name, frozenset()) - seen
    return seen


class Once(NamedTuple):
    """A function of a module that is named in one place only."""

    name: str
    path: str
    line: int
    lines: int
    use: str

    def __str__(self) -> str:
        """The function with its number of lines, and its place and that of its use."""
        return f"{self.path}:{self.line} {self.name} ({self.lines}) <- {self.use}"


def named_once(modules: list[Module]) -> list[Once]:
    """The functions that are named in one place only."""
    places: dict[str, list[tuple[str, int]]] = defaultdict(list)
    for module in modules:
        for node in ast.walk(module.tree):
            if isinstance(node, ast.Name):
                places[node.id.lstrip("_")].append((module.path, node.lineno))
            elif isinstance(node, ast.Attribute):
                line = node.end_lineno or node.lineno
                places[node.attr.lstrip("_")].append((module.path, line))
    found = []
    for module in modules:
        for function in module.tree.body:
            if not isinstance(function, Definition) or function.name.startswith("__"):
                continue
            last = function.end_lineno or function.lineno
            own = range(function.lineno, last + 1)
            uses = [
                f"{path}:{line}"
                for path, line in places[function.name.lstrip("_")]
                if path != module.path or line not in own
            ]
            if len(uses) == 1:
                found.append(Once(function.name, module.path, function.lineno, len(own), uses[0]))
    return found


def lines_by_kind(module: Module) -> Counter[str]:
    """The lines of a module that are import, `__all__`, docstring, blank, comment, statement."""
    marked: dict[int, str] = {}
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            marked |= dict.fromkeys(_lines_of(node), "import")
        elif isinstance(node, ast.Assign) and "__all__" in map(ast.unparse, node.targets):
            marked |= dict.fromkeys(_lines_of(node), "__all__")
        elif isinstance(node, ast.Module | ast.ClassDef | Definition):
            for part in node.body:
                if isinstance(part, ast.Expr) and _is_string(part.value):
                    marked |= dict.fromkeys(_lines_of(part), "docstring")
    found: Counter[str] = Counter()
    for number, line in enumerate(module.text, 1):
        bare = line.strip()
        plain = "comment" if bare.startswith("#") else "statement" if bare else "blank"
        found[marked.get(number, plain)] += 1
    return found


def _lines_of(node: ast.stmt) -> range:
    return range(node.lineno, (node.end_lineno or node.lineno) + 1)


def _is_string(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and isinstance(node.value, str)


def numbers(modules: list[Module], imports: Arrows) -> dict[str, float]:
    """The numbers of a house that can be read from its files."""
    kinds = sum(map(lines_by_kind, modules), Counter[str]())
    return {
        "source files": len(modules),
        "modules that only their neighbour imports": len(neighbours(modules, imports)),
        "pairs of classes with five equal fields": len(twins(modules)),
        "percent of lines that import": round(100 * kinds["import"] / max(kinds.total(), 1), 1),
        "lines of statements": kinds["statement"],
        "functions named in one place": len(named_once(modules)),
    }


class Sentence(NamedTuple):
    """A place where a test compares a sentence."""

    path: str
    line: int
    text: str

    def __str__(self) -> str:
        """The place and the sentence."""
        return f"{self.path}:{self.line} {self.text!r}"


def sentences(tests: list[Module]) -> list[Sentence]:
    """The sentences that tests compare."""
    found = []
    for module in tests:
        for node in ast.walk(module.tree):
            if isinstance(node, ast.keyword) and node.arg == "match":
                compared = node.value
            elif isinstance(node, ast.Assert):
                compared = node.test
            else:
                continue
            parts = [part for part in ast.walk(compared) if isinstance(part, ast.Constant)]
            texts = [part.value for part in parts if isinstance(part.value, str)]
            long = [text for text in texts if SENTENCE.search(text)]
            if long:
                found.append(Sentence(module.path, compared.lineno, long[0]))
    return found


def pages(root: Path) -> list[Path]:
    """The README and all pages of the documentation."""
    return [root / "README.md", *sorted((root / "docs").rglob("*.md"))]


def written_numbers(root: Path, tests: list[Module]) -> dict[str, float]:
    """The numbers of what stands beside the source: pages and tests."""
    return {
        "words of documentation": sum(len(p.read_text("utf-8").split()) for p in pages(root)),
        "lines of tests": sum(module.lines for module in tests),
        "sentences that tests compare": len(sentences(tests)),
    }


def sizes(modules: list[Module]) -> tuple[int, int]:
    """The median of the lines of a module, and the lines that one of ten exceeds."""
    lines = [module.lines for module in modules if module.lines >= SHORTEST]
    tenths = quantiles(lines, n=10, method="inclusive")
    return round(tenths[4]), round(tenths[8])
