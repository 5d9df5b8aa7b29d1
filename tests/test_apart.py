"""The core works where the packages that stand apart are missing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from tiny import save_tiny
from zoo import tiny_windows

from secateur.calibration.windows import save_windows
from secateur.recipes.verbs import APART

REFUSED = (*APART, "secateur.plugins")
CORE_ONLY = """
import sys

class Missing:
    def find_spec(self, name, path=None, target=None):
        if name in {refused!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Missing())
import contextlib, io, json
import secateur
from secateur.cli import main

def run(*words):
    sys.argv, out, err = ["secateur", *words], io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main()
        except SystemExit as ended:
            return ended.code or 0, out.getvalue(), err.getvalue()

print(json.dumps([run(*words) for words in json.loads(sys.stdin.read())]))
assert not hasattr(secateur, "advise")
"""


def test_the_core_prunes_compresses_evaluates_and_runs_alone(tmp_path: Path) -> None:
    source, text = save_tiny(tmp_path / "source"), tmp_path / "windows.safetensors"
    save_windows(tiny_windows(), text)
    (tmp_path / "text.txt").write_text("a b c " * 200)
    pruned, packed = tmp_path / "pruned", tmp_path / "packed"
    commands: list[tuple[object, ...]] = [
        ("--help",),
        ("prune", source, "--sparsity", 0.5, "--calibration", text, "--output", pruned),
        ("compress", pruned, "--output", packed),
        ("evaluate", packed, "--text", tmp_path / "text.txt", "--sequence-length", 16, "--json"),
        ("generate", packed, "--prompt", "a", "--max-new-tokens", 2, "--json"),
        ("serve", packed),
    ]
    where = os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH"), *sys.path]))
    done = subprocess.run(
        [sys.executable, "-c", CORE_ONLY.format(refused=REFUSED)],
        input=json.dumps([[str(word) for word in words] for words in commands]),
        env={**os.environ, "PYTHONPATH": where},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    helped, *worked, served = json.loads(done.stdout)
    assert [code for code, _, _ in (helped, *worked)] == [0] * 5, worked
    lines = {line.split()[1] for line in helped[1].splitlines() if line.startswith("│ ")}
    assert {"prune", "chain", "export"} <= lines
    assert not {"serve", "advise", "report", "push"} & lines
    assert served[0] == 2


def test_a_package_apart_has_a_verb() -> None:
    """`secateur --help` imports this module of each, and nothing else of the package."""
    loaded = "import sys, secateur.cli.app; print(*sorted(sys.modules))"
    modules = subprocess.run(
        [sys.executable, "-c", loaded], check=True, capture_output=True, text=True
    ).stdout.split()
    for name in APART:
        assert [module for module in modules if module.startswith(name)] == [name]
