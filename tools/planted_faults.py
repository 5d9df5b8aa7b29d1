"""Plant faults in the source, one at a time, and see whether the tests find them.

    python tools/planted_faults.py --count 40 --seed 1 --clone /tmp/faults

A fault is a condition that is negated, a comparison that is turned around, plus for minus, times
for divided by, or a call whose result nobody uses that is left out. Modules are drawn by their
lines of statements, so every room has its share.

The default tests run once with a probe at each place, which notes the tests that come by, also in
processes that they start. For each fault the tests run that came by, first one of each file, then
all, then the whole files and the tests of the room, until one fails. A line says which found it.
A second call with the same clone reads what the probes noted.

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


PROBE = '''
"""Notes which test came by a probe."""
import os

seen = set()


def hit(number, value=None):
    test = os.environ.get("PYTEST_CURRENT_TEST", "").rpartition(" (")[0]
    if test and (number, test) not in seen:
        seen.add((number, test))
        with open(os.path.join({folder!r}, str(number)), "a") as file:
            file.write(test + "\\n")
    return value
'''


class Probes(ast.NodeTransformer):
    """Puts a probe around the places of faults in one module."""

    def __init__(self, numbers: dict[tuple[int, int, int, int, str], list[int]]) -> None:
        self.numbers = numbers

    def visit(self, node: ast.AST) -> ast.AST:
        """A node, within its probes if a fault is planted there."""
        if any("jit" in ast.unparse(x) for x in getattr(node, "decorator_list", ())):
            return node
        inner = self.generic_visit(node)
        for number in self.numbers.get(_place(node), ()):
            call = ast.parse(f"__import__('probe').hit({number})", mode="eval").body
            assert isinstance(call, ast.Call)
            if isinstance(inner, ast.Expr):
                call.args.append(inner.value)
                inner = ast.copy_location(ast.Expr(call), node)
            else:
                call.args.append(inner)  # type: ignore[arg-type]
                inner = ast.copy_location(call, node)
        return inner


def _place(node: ast.AST) -> tuple[int, int, int, int, str]:
    names = ("lineno", "col_offset", "end_lineno", "end_col_offset")
    line, column, end, last = (getattr(node, name, 0) for name in names)
    return line, column, end, last, type(node).__name__


def run_tests(
    clone: Path, tests: list[str], processes: int = 2
) -> subprocess.CompletedProcess[str]:
    """Run tests in the clone, until one fails if some are named."""
    command = [sys.executable, "-m", "pytest", "-q", "-m", "not slow", "-n", str(processes)]
    command += ["--dist=loadfile"] * (processes > 0)
    path = f"{clone / 'src'}:{clone}"
    return subprocess.run(
        [*command, *(["-x"] if tests else []), *tests], cwd=clone, capture_output=True, text=True,
        timeout=SECONDS if tests else None,
        env={"PATH": "/usr/bin:/bin", "PYTHONPATH": path, "HOME": str(Path.home()),
             "OMP_NUM_THREADS": "1"},
    )  # fmt: skip


def tests_by_fault(clone: Path, planted: list[Fault]) -> list[list[str]]:
    """The tests that come by each fault, from one run of the default tests."""
    hits = clone / "hits"
    files = [hits / str(number) for number in range(len(planted))]
    if not hits.exists():
        _run_with_probes(clone, planted, hits)
    return [list(dict.fromkeys(f.read_text().splitlines())) if f.exists() else [] for f in files]


def _run_with_probes(clone: Path, planted: list[Fault], hits: Path) -> None:
    hits.mkdir()
    (clone / "probe.py").write_text(PROBE.format(folder=str(hits)), encoding="utf-8")
    for module in {fault.module.path: fault.module for fault in planted}.values():
        numbers: dict[tuple[int, int, int, int, str], list[int]] = {}
        for number, fault in enumerate(planted):
            if fault.module.path == module.path:
                numbers.setdefault(_place(fault.node), []).append(number)
        probed = Probes(numbers).visit(ast.parse("\n".join(module.text)))
        source = ast.unparse(ast.fix_missing_locations(probed))
        (clone / "src" / module.path).write_text(source + "\n", encoding="utf-8")
    print(run_tests(clone, []).stdout.splitlines()[-1], flush=True)
    subprocess.run(["git", "checkout", "-q", "src"], cwd=clone, check=True)


def found_by(clone: Path, fault: Fault, tests: list[str]) -> str:
    """The first test that fails; empty if all pass."""
    file = clone / "src" / fault.module.path
    file.write_text(fault.source, encoding="utf-8")
    room = f"tests/{fault.module.path.split('/')[1].removesuffix('.py')}"
    of_files = {test.partition("::")[0]: test for test in tests}
    rooms = [room] * (clone / room).is_dir()
    coming = [[*of_files.values()], tests, list(dict.fromkeys([*of_files, *rooms]))]
    try:
        for number, some in enumerate(filter(None, coming)):
            try:
                done = run_tests(clone, some, processes=2 if number else 0)
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
    coming = tests_by_fault(chosen.clone, planted)
    caught = 0
    for number, (fault, tests) in enumerate(zip(planted, coming, strict=True), 1):
        test = found_by(chosen.clone, fault, tests)
        caught += bool(test)
        found = test or f"NOT FOUND, {len(tests)} tests came by"
        print(f"{number} {fault.place} {fault.text!r}: {found}", flush=True)
    print(f"{caught} of {len(planted)} found, seed {chosen.seed}")


if __name__ == "__main__":
    main()
