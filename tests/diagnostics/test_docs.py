"""Every kind of finding is used, and has its entry in the documentation."""

from __future__ import annotations

import ast
import re
from pathlib import Path

from secateur.diagnostics.findings import KINDS

ROOT = Path(__file__).parents[2]


def ids_in_code() -> set[str]:
    """The kinds that the code names, outside their table."""
    found = {"dead-row", "dead-column"}  # put together from a part
    files = [*(ROOT / "src/secateur/diagnostics").glob("*.py")]
    for file in [*files, ROOT / "src/secateur/steps/diagnose.py"]:
        tree = ast.parse(file.read_text(encoding="utf-8"))
        keys = {id(key) for x in ast.walk(tree) if isinstance(x, ast.Dict) for key in x.keys}
        found |= {
            x.value
            for x in ast.walk(tree)
            if isinstance(x, ast.Constant) and id(x) not in keys and x.value in KINDS
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
    assert documented == ids_in_code() == KINDS.keys()
