"""Text files have the same bytes on every system: their encoding and line ends are named."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import secateur

ROOT = Path(secateur.__file__).parent
READ, WRITTEN = {"encoding"}, {"encoding", "newline"}


def needed(call: ast.Call) -> set[str]:
    """The arguments that a call must have; none if it opens no text."""
    name = call.func.attr if isinstance(call.func, ast.Attribute) else ""
    if isinstance(call.func, ast.Name):
        name = call.func.id
    if name in ("read_text", "write_text"):
        return READ if name == "read_text" else WRITTEN
    if name not in ("open", "fdopen"):
        return set()
    values = [*call.args, *(word.value for word in call.keywords if word.arg == "mode")]
    modes = [x.value for x in values if isinstance(x, ast.Constant) and isinstance(x.value, str)]
    mode = next((x for x in modes if x and set(x) <= set("rwaxbt+")), None)
    if mode is None or "b" in mode:
        return set()
    return WRITTEN if set(mode) & set("wax") and name == "open" else READ


def unnamed(source: str) -> list[str]:
    """Calls that leave one to the system. Functions of that name are ours."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call):
            own = isinstance(node.func, ast.Name) and node.func.id != "open"
            by_place = {x.value for x in node.args if isinstance(x, ast.Constant)}
            missing = needed(node) - {word.arg for word in node.keywords}
            missing -= {"encoding"} if "utf-8" in by_place else set()
            if missing and not own:
                found.append(f"line {node.lineno}: {', '.join(sorted(missing))}")
    return found


def test_nothing_is_left_to_the_system() -> None:
    found = {
        str(file.relative_to(ROOT)): lines
        for file in sorted(ROOT.rglob("*.py"))
        if (lines := unnamed(file.read_text(encoding="utf-8")))
    }
    assert not found


@pytest.mark.parametrize(
    "source",
    [
        "p.read_text()",
        "p.write_text(x, encoding='utf-8')",
        "p.open('w')",
        "open(p, 'a', encoding='utf-8')",
        "p.open(mode='r')",
        "os.fdopen(1, 'w')",
    ],
)
def test_what_is_left_to_the_system_is_found(source: str) -> None:
    assert unnamed(source)


def test_bytes_have_neither() -> None:
    assert not unnamed("p.open('rb'); p.open('r+b', buffering=0); p.read_bytes(); f.open()")
