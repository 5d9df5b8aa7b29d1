"""Killed, or with the disk full, between any two file operations: nothing is lost.

`everywhere.py` tries every point. Here it tries a few of some cases, and in the slow tests of the
others. Those about the rename that gives a finished folder its name are always among them.
Every try is a fork of one process.
"""

from __future__ import annotations

import inspect
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
from cases import CASES
from everywhere import FEW, IDENTICAL, Trial
from faults import build_shim, environment, why_not

import secateur

SCRIPT = Path(__file__).with_name("everywhere.py")
DEFAULT, SLOW = "default", "slow"

CASES_OF = {
    DEFAULT: [["prune", "chain", "export", "sweep", "structure of a file"]],
    SLOW: [
        [
            "prune best",
            "prune best saved",
            "prune best in sweeps",
            "prune behind norms",
            "prune experts",
            "prune with a bound",
            "prune disk",
            "prune search",
            "structure",
            "structure best",
            "structure experts",
            "decompress",
            "fit",
            "fit for llama.cpp",
            "fit like",
            "draft",
            "draft mtp",
            "import",
        ],
        ["train", "train with a teacher", "compress", "compress int8", "compress to gguf"],
    ],
}
"""The cases of each process; the processes of a kind of tests run at the same time. The default
tests try a step of the runner, four of them in a row (structure, prune, train, compress), the two
that write in ways of their own, and the one that writes a file."""

REPLACING = [*CASES]

Trials = Callable[[str], list[Trial]]


@pytest.fixture(scope="module")
def trials(tmp_path_factory: pytest.TempPathFactory) -> Trials:
    """What became of every point that was tried, by a key of `CASES_OF`."""
    if reason := why_not():
        pytest.skip(reason)
    found: dict[str, list[Trial]] = {}

    def tried(kind: str) -> list[Trial]:
        if kind not in found:
            found[kind] = try_points(CASES_OF[kind], tmp_path_factory.mktemp("faults"))
        return found[kind]

    return tried


def try_points(shares: list[list[str]], place: Path) -> list[Trial]:
    """Run the processes that try a few points of all their cases."""
    variables = environment(build_shim(place))
    paths = [str(SCRIPT.parents[1] / "support"), os.environ.get("PYTHONPATH", "")]
    variables["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    files = [place / f"{number}.jsonl" for number in range(len(shares))]
    running = [
        subprocess.Popen(
            [sys.executable, SCRIPT, "--points", "few", "--json", file, *names],
            env=variables, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )
        for file, names in zip(files, shares, strict=True)
    ]  # fmt: skip
    for process in running:
        output, _ = process.communicate()
        print(output)
        assert process.returncode == 0, output
    lines = [line for file in files for line in file.read_text(encoding="utf-8").splitlines()]
    return [Trial(**json.loads(line)) for line in lines]


def cases_of(names: Iterable[str]) -> pytest.MarkDecorator:
    """Each of these cases, in the tests that try it."""
    wanted = set(names)
    return pytest.mark.parametrize(
        ("kind", "case"),
        [
            pytest.param(kind, name, marks=[pytest.mark.slow] if kind == SLOW else [])
            for kind, shares in CASES_OF.items()
            for names in shares
            for name in names
            if name in wanted
        ],
    )


def of(trials: Trials, kind: str, case: str, *, full: bool) -> list[Trial]:
    """The points of a case at which the fault came to pass."""
    found = [x for x in trials(kind) if x.case == case and x.full is full and x.reached]
    assert len(found) >= FEW[full, False] - 1
    return found


def test_every_verb_that_writes_a_folder_is_tried() -> None:
    tried = [name for shares in CASES_OF.values() for names in shares for name in names]
    assert sorted(tried) == sorted(CASES)
    public = {name: getattr(secateur, name) for name in secateur.__all__}
    functions = {name: x for name, x in public.items() if inspect.isfunction(x)}
    writing = {n for n, x in functions.items() if "overwrite" in inspect.signature(x).parameters}
    assert {*writing} == {case.verb for case in CASES.values()}


@cases_of(CASES)
def test_killed_at_any_point_the_same_call_again_gives_the_same_bytes(
    kind: str, case: str, trials: Trials
) -> None:
    tried = of(trials, kind, case, full=False)
    assert not [x for x in tried if x.verdict != IDENTICAL or x.left_over]


@cases_of(CASES)
def test_after_a_full_disk_the_same_call_again_gives_the_same_bytes(
    kind: str, case: str, trials: Trials
) -> None:
    tried = of(trials, kind, case, full=True)
    assert not [x for x in tried if x.verdict != IDENTICAL or x.left_over]


@cases_of(CASES)
def test_a_full_disk_is_an_error_of_ours(kind: str, case: str, trials: Trials) -> None:
    assert not [x for x in of(trials, kind, case, full=True) if x.crashed]


@cases_of(REPLACING)
def test_the_old_output_is_there_until_the_new_one_is(kind: str, case: str, trials: Trials) -> None:
    replacing = [x for x in trials(kind) if x.case == case and x.replacing]
    assert len(replacing) >= FEW[False, True]
    assert not [x for x in replacing if x.gone]
