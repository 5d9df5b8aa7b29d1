"""Every finding has its entry in the documentation."""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[2]


def ids_in_code() -> set[str]:
    """The first argument of every Finding, and of the shorthand for those of layers."""
    found = {"dead-row", "dead-column"}  # put together from a part
    files = [*(ROOT / "src/secateur/diagnostics").glob("*.py")]
    for file in [*files, ROOT / "src/secateur/steps/diagnose.py"]:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            called = isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
            if called and node.func.id in ("Finding", "fault"):
                found |= {
                    x.value
                    for x in ast.walk(node.args[0])
                    if isinstance(x, ast.Constant) and re.fullmatch(r"[a-z]+(-[a-z]+)*", x.value)
                }
    return found


def test_the_page_has_them_all_and_no_others() -> None:
    page = (ROOT / "docs/diagnosis.md").read_text(encoding="utf-8")
    documented = {
        name
        for line in page.splitlines()
        if line.startswith("| `")
        for name in re.findall(r"`([a-z-]+)`", line.split("|")[1])
    }
    assert documented == ids_in_code()
