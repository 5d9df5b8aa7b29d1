"""Killed, or with the disk full, between any two file operations: nothing is lost.

`everywhere.py` tries every point; here it tries some of each verb, among them those about the
rename that gives a finished folder its name. Every try is a fork of one process.
"""

from __future__ import annotations

import inspect
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from cases import CASES
from everywhere import QUICK
from faults import build_shim, environment, why_not
from outcomes import IDENTICAL, Trial

import secateur

SCRIPT = Path(__file__).with_name("everywhere.py")
SHARES = [
    [
        "prune",
        "prune best",
        "prune best saved",
        "prune disk",
        "prune search",
        "structure",
        "structure best",
        "decompress",
    ],
    ["retrain", "distill", "chain", "compress", "compress int8", "sweep"],
]
"""The cases of two processes that run at the same time."""


@pytest.fixture(scope="module")
def trials(tmp_path_factory: pytest.TempPathFactory) -> list[Trial]:
    """What became of every point that was tried."""
    if reason := why_not():
        pytest.skip(reason)
    place = tmp_path_factory.mktemp("faults")
    variables = environment(build_shim(place))
    paths = [str(SCRIPT.parents[1]), os.environ.get("PYTHONPATH", "")]
    variables["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    files = [place / f"{number}.jsonl" for number in range(len(SHARES))]
    running = [
        subprocess.Popen(
            [sys.executable, SCRIPT, "--quick", "1", "--json", file, *names],
            env=variables, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )
        for file, names in zip(files, SHARES, strict=True)
    ]  # fmt: skip
    for process in running:
        told, _ = process.communicate()
        print(told)
        assert process.returncode == 0, told
    lines = [line for file in files for line in file.read_text(encoding="utf-8").splitlines()]
    return [Trial(**json.loads(line)) for line in lines]


def of(trials: list[Trial], case: str, *, full: bool) -> list[Trial]:
    """The points of a case at which the fault came to pass."""
    found = [x for x in trials if x.case == case and x.full is full and x.reached]
    assert len(found) >= QUICK[full, False] - 1
    return found


def test_every_verb_that_writes_a_folder_is_tried() -> None:
    assert sorted(name for names in SHARES for name in names) == sorted(CASES)
    public = {name: getattr(secateur, name) for name in secateur.__all__}
    functions = {name: x for name, x in public.items() if inspect.isfunction(x)}
    writing = {n for n, x in functions.items() if "overwrite" in inspect.signature(x).parameters}
    assert {*writing, "sweep"} == {case.verb for case in CASES.values()}


@pytest.mark.parametrize("case", CASES)
def test_killed_at_any_point_the_same_call_again_gives_the_same_bytes(
    case: str, trials: list[Trial]
) -> None:
    wrong = [x for x in of(trials, case, full=False) if x.verdict != IDENTICAL or x.left_over]
    assert not wrong


@pytest.mark.parametrize("case", CASES)
def test_after_a_full_disk_the_same_call_again_gives_the_same_bytes(
    case: str, trials: list[Trial]
) -> None:
    wrong = [x for x in of(trials, case, full=True) if x.verdict != IDENTICAL or x.left_over]
    assert not wrong


@pytest.mark.parametrize("case", CASES)
def test_a_full_disk_is_an_error_of_ours(case: str, trials: list[Trial]) -> None:
    assert not [x for x in of(trials, case, full=True) if x.crashed]


@pytest.mark.parametrize("case", [name for name, case in CASES.items() if case.replaces])
def test_the_old_output_is_there_until_the_new_one_is(case: str, trials: list[Trial]) -> None:
    replacing = [x for x in trials if x.case == case and x.replacing]
    assert len(replacing) >= QUICK[False, True]
    assert not [x for x in replacing if x.gone]
