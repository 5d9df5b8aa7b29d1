"""Plant faults in the source, one at a time, and see whether the tests find them.

    python tools/planted_faults.py --count 40 --seed 1 --clone /tmp/faults

A fault is a condition that is negated, a comparison that is turned around, plus for minus, times
for divided by, or a call whose result nobody uses that is left out. Modules are drawn by their
lines of statements, so every room has its share. For each fault the tests of its room run, then
those of whole verbs, then all default tests, until one fails. A line says which found it.

The clone is made from the commit that is checked out here; nothing is changed in this tree.
"""

from __future__ import annotations

import argparse
import ast
import copy
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from house_numbers import Module, lines_by_kind, read_modules

ROOT = Path(__file__).resolve().parents[1]
TURNED: dict[type[ast.cmpop], type[ast.cmpop]] = {
    ast.Lt: ast.GtE, ast.GtE: ast.Lt, ast.Gt: ast.LtE, ast.LtE: ast.Gt, ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq, ast.In: ast.NotIn, ast.NotIn: ast.In, ast.Is: ast.IsNot, ast.IsNot: ast.Is,
}  # fmt: skip
SWAPPED: dict[type[ast.operator], type[ast.operator]] = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.FloorDiv: ast.Mult,
}  # fmt: skip
SECONDS = 900
"""A test run that takes longer has found a fault that hangs."""


class Fault(NamedTuple):
    """A change of one node of a module."""

    module: Module
    node: ast.AST
    text: str

    @property
    def place(self) -> str:
        """File and line."""
        return f"{self.module.path}:{getattr(self.node, 'lineno', 0)}"

    @property
    def source(self) -> str:
        """The module with the fault."""
        lines = "\n".join(self.module.text).encode().split(b"\n")
        node = self.node
        assert isinstance(node, ast.expr | ast.stmt)
        assert node.end_lineno is not None
        assert node.end_col_offset is not None
        before = [*lines[: node.lineno - 1], lines[node.lineno - 1][: node.col_offset]]
        after = [lines[node.end_lineno - 1][node.end_col_offset :], *lines[node.end_lineno :]]
        return (b"\n".join(before) + self.text.encode() + b"\n".join(after)).decode() + "\n"


def faults(module: Module) -> Iterator[Fault]:
    """All faults that can be planted in a module, outside of annotations and of texts of errors."""
    for function in ast.walk(module.tree):
        if isinstance(function, ast.FunctionDef):
            for statement in function.body:
                yield from _faults_below(module, statement)


def _faults_below(module: Module, top: ast.stmt) -> Iterator[Fault]:
    for node in ast.walk(top):
        if isinstance(node, ast.If | ast.IfExp):
            yield Fault(module, node.test, f"(not ({ast.unparse(node.test)}))")
        elif isinstance(node, ast.Compare) and len(node.ops) == 1:
            turned = copy.deepcopy(node)
            turned.ops = [TURNED[type(node.ops[0])]()]
            yield Fault(module, node, f"({ast.unparse(turned)})")
        elif isinstance(node, ast.BinOp) and type(node.op) in SWAPPED and not _text(node):
            swapped = copy.deepcopy(node)
            swapped.op = SWAPPED[type(node.op)]()
            yield Fault(module, node, f"({ast.unparse(swapped)})")
        elif isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
            yield Fault(module, node, "pass")


def _text(node: ast.AST) -> bool:
    constants = (x.value for x in ast.walk(node) if isinstance(x, ast.Constant))
    return any(isinstance(value, str) for value in constants)


def drawn(modules: list[Module], count: int, seed: int) -> list[Fault]:
    """Faults at random: a module by its statements, then one of its faults."""
    draw = random.Random(seed)
    known = {module.path: [*faults(module)] for module in modules}
    having = [module for module in modules if known[module.path]]
    weights = [lines_by_kind(module)["statement"] for module in having]
    return [draw.choice(known[m.path]) for m in draw.choices(having, weights, k=count)]


def rounds_of_tests(clone: Path, fault: Fault) -> Iterator[list[str]]:
    """What runs, in this order: the tests of the room, of whole verbs, and all."""
    room = clone / "tests" / fault.module.path.split("/")[1].removesuffix(".py")
    if room.is_dir():
        yield [str(room)]
    yield [str(clone / "tests" / name) for name in ("steps", "contracts", "test_doctests.py")]
    yield [str(clone / "tests")]


def found_by(clone: Path, fault: Fault) -> str:
    """The first test that fails; empty if all pass."""
    file = clone / "src" / fault.module.path
    file.write_text(fault.source, encoding="utf-8")
    try:
        for paths in rounds_of_tests(clone, fault):
            command = [sys.executable, "-m", "pytest", "-q", "-x", "-m", "not slow", "-n", "2"]
            try:
                done = subprocess.run(
                    [*command, *paths], cwd=clone, capture_output=True, text=True,
                    timeout=SECONDS, env={"PATH": "/usr/bin:/bin", "PYTHONPATH": str(clone / "src"),
                                          "HOME": str(Path.home()), "OMP_NUM_THREADS": "1"},
                )  # fmt: skip
            except subprocess.TimeoutExpired:
                return "a run that does not end"
            if done.returncode:
                failed = [x for x in done.stdout.splitlines() if x.startswith(("FAILED", "ERROR"))]
                return failed[0][:120] if failed else done.stdout[-200:] + done.stderr[-200:]
        return ""
    finally:
        file.write_text("\n".join(fault.module.text) + "\n", encoding="utf-8")


def main() -> None:
    """Plant the faults."""
    parser = argparse.ArgumentParser(description="Plant faults and see whether tests find them.")
    parser.add_argument("--count", type=int, default=40)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--clone", type=Path, required=True)
    chosen = parser.parse_args()
    if not chosen.clone.exists():
        subprocess.run(["git", "clone", "-q", str(ROOT), str(chosen.clone)], check=True)
        kernels = "src/secateur/runtime/kernels"
        for library in (ROOT / kernels).glob("_native*.so"):
            (chosen.clone / kernels / library.name).write_bytes(library.read_bytes())
    planted = drawn(read_modules(chosen.clone / "src"), chosen.count, chosen.seed)
    caught = 0
    for number, fault in enumerate(planted, 1):
        test = found_by(chosen.clone, fault)
        caught += bool(test)
        print(f"{number} {fault.place} {fault.text!r}: {test or 'NOT FOUND'}", flush=True)
    print(f"{caught} of {len(planted)} found, seed {chosen.seed}")


if __name__ == "__main__":
    main()
