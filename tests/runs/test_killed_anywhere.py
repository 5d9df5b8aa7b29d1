"""Killed, or with the disk full, between any two file operations: nothing is lost.

`everywhere.py` tries every point. Here it tries a few of some cases, and in the slow tests some of
each case. Those about the rename that gives a finished folder its name are always among them.
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
from everywhere import COUNTS
from faults import build_shim, environment, why_not
from outcomes import IDENTICAL, Trial

import secateur

SCRIPT = Path(__file__).with_name("everywhere.py")
FIRST = ["prune", "chain", "export", "sweep"]
"""What the default tests try: a step of the runner, four of them in a row (structure, prune, train,
compress), and the two that write in ways of their own. The slow tests try all cases."""

SHARES = {
    "few": [FIRST],
    "some": [
        [
            "prune",
            "prune best",
            "prune best saved",
            "prune best in sweeps",
            "prune behind norms",
            "prune experts",
            "prune disk",
            "prune search",
            "structure",
            "structure best",
            "decompress",
            "export",
            "fit",
            "draft",
            "import",
        ],
        ["train", "train with a teacher", "chain", "compress", "compress int8", "sweep"],
    ],
}
"""The cases of each process; the processes run at the same time."""

REPLACING = [name for name, case in CASES.items() if case.replaces]

Trials = Callable[[str], list[Trial]]


@pytest.fixture(scope="module")
def trials(tmp_path_factory: pytest.TempPathFactory) -> Trials:
    """What became of every point that was tried, by a key of `SHARES`."""
    if reason := why_not():
        pytest.skip(reason)
    found: dict[str, list[Trial]] = {}

    def tried(points: str) -> list[Trial]:
        if points not in found:
            found[points] = try_points(points, tmp_path_factory.mktemp("faults"))
        return found[points]

    return tried


def try_points(points: str, place: Path) -> list[Trial]:
    """Run the processes that try some points of all cases of `SHARES`."""
    variables = environment(build_shim(place))
    paths = [str(SCRIPT.parents[1]), os.environ.get("PYTHONPATH", "")]
    variables["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    files = [place / f"{number}.jsonl" for number in range(len(SHARES[points]))]
    running = [
        subprocess.Popen(
            [sys.executable, SCRIPT, "--points", points, "--json", file, *names],
            env=variables, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )
        for file, names in zip(files, SHARES[points], strict=True)
    ]  # fmt: skip
    for process in running:
        output, _ = process.communicate()
        print(output)
        assert process.returncode == 0, output
    lines = [line for file in files for line in file.read_text(encoding="utf-8").splitlines()]
    return [Trial(**json.loads(line)) for line in lines]


def few_or_some(names: Iterable[str]) -> pytest.MarkDecorator:
    """A few points of the first case of each verb; in the slow tests, some of every case."""
    values = [
        *(("few", name) for name in names if name in FIRST),
        *(pytest.param("some", name, marks=pytest.mark.slow) for name in names),
    ]
    return pytest.mark.parametrize(("points", "case"), values)


def of(trials: Trials, points: str, case: str, *, full: bool) -> list[Trial]:
    """The points of a case at which the fault came to pass."""
    tried = trials(points)
    found = [x for x in tried if x.case == case and x.full is full and x.reached]
    counts = COUNTS[points]
    assert counts is not None
    assert len(found) >= counts[full, False] - 1
    return found


def test_every_verb_that_writes_a_folder_is_tried() -> None:
    assert sorted(name for names in SHARES["some"] for name in names) == sorted(CASES)
    public = {name: getattr(secateur, name) for name in secateur.__all__}
    functions = {name: x for name, x in public.items() if inspect.isfunction(x)}
    writing = {n for n, x in functions.items() if "overwrite" in inspect.signature(x).parameters}
    assert {*writing, "sweep"} == {case.verb for case in CASES.values()}


@few_or_some(CASES)
def test_killed_at_any_point_the_same_call_again_gives_the_same_bytes(
    points: str, case: str, trials: Trials
) -> None:
    tried = of(trials, points, case, full=False)
    assert not [x for x in tried if x.verdict != IDENTICAL or x.left_over]


@few_or_some(CASES)
def test_after_a_full_disk_the_same_call_again_gives_the_same_bytes(
    points: str, case: str, trials: Trials
) -> None:
    tried = of(trials, points, case, full=True)
    assert not [x for x in tried if x.verdict != IDENTICAL or x.left_over]


@few_or_some(CASES)
def test_a_full_disk_is_an_error_of_ours(points: str, case: str, trials: Trials) -> None:
    assert not [x for x in of(trials, points, case, full=True) if x.crashed]


@few_or_some(REPLACING)
def test_the_old_output_is_there_until_the_new_one_is(
    points: str, case: str, trials: Trials
) -> None:
    replacing = [x for x in trials(points) if x.case == case and x.replacing]
    counts = COUNTS[points]
    assert counts is not None
    assert len(replacing) >= counts[False, True]
    assert not [x for x in replacing if x.gone]
