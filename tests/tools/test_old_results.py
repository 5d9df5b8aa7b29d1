"""A result is old when code that it measures has changed, unless the same weights are proven."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest

import old_results
from measured_tables import Result
from old_results import changed, old, prove

CODE = '"""Says it."""\n\n\ndef f(x):\n    """Doubles."""\n    return 2 * x  # twice\n'


class Kept(Result):
    script = SimpleNamespace(MEASURES=["src"], MINUTES=3, PROOF=["llama/wanda"])  # type: ignore


def commit(folder: Path, text: str) -> str:
    """Write the one file of a repository; returns the commit."""
    (folder / "src").mkdir(exist_ok=True)
    (folder / "src/a.py").write_text(text)
    identity = "git -c user.name=me -c user.email=me@example.com"
    script = f"git init -q -b main; git add src; {identity} commit -q -m x; git rev-parse HEAD"
    return subprocess.check_output(script, shell=True, cwd=folder, text=True).strip()


def result_of(commit: str) -> Kept:
    return Kept("x", {"heading": "a; b; 2026-12-01", "rows": [{"commit": commit}]})


@pytest.mark.parametrize("digest", ["as before", "another"])
def test_a_result_is_as_new_as_the_code_that_writes_its_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, digest: str
) -> None:
    for name in ("ROOT", "RESULTS"):
        monkeypatch.setattr(old_results, name, tmp_path)
    first = commit(tmp_path, CODE)
    commit(tmp_path, CODE.replace("Doubles", "Times two").replace("# twice", "# 2x"))
    assert not list(old([result_of(first)]))  # comments and docstrings are not code
    last = commit(tmp_path, CODE.replace("2 * x", "x * 2"))
    assert (list(changed(first, ["src"])), list(changed(first, []))) == (["src/a.py"], [])
    assert ["commit 12345678 is not here" in x for x in old([result_of("12345678")])] == [True]
    found = {first: "as before", last: digest}
    monkeypatch.setattr(old_results, "weights", lambda x, cases: {cases[0]: {"a.gguf": found[x]}})
    begun, meanwhile = result_of(first), {"commit": last, "added": "by a benchmark"}
    (tmp_path / "x.json").write_text(json.dumps({"rows": [*begun.content["rows"], meanwhile]}))
    assert len([*prove([begun])]) == 1
    proven = Kept("x", json.loads((tmp_path / "x.json").read_text()))
    assert proven.content["rows"][1:] == [meanwhile]
    equal = digest == "as before"
    assert proven.content["rows"][0].get("same_as") == (last[:8] if equal else None)
    assert bool([*old([proven])]) != equal
    Kept.script.ours = lambda row: "other" not in row
    rows = [{"commit": last}, {"commit": first}, {"commit": first, "other": True}]
    assert " 1 of 3 rows" in next(old([Kept("x", {"rows": rows})]))
