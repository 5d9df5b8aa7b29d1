"""The path of a run is the order in which its modules are first used."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest

from recipe_path import at_formula, climbs, opened_modules, picture, stays

ARROWS = {"cli": {"engine"}, "engine": {"maths"}, "maths": set(), "report": {"maths"}}
OPENED = [
    "secateur.cli.app",
    "secateur.engine.run",
    "secateur.errors",
    "secateur.engine.stream.calls",
    "secateur.maths.sums",
    "secateur.engine.plan_memory",
    "secateur.report",
    "secateur",
]


def test_a_stay_is_in_one_room_and_the_ground_does_not_count() -> None:
    assert stays(OPENED) == [
        ("cli", ["secateur.cli.app"]),
        ("engine", ["secateur.engine.run", "secateur.engine.stream.calls"]),
        ("maths", ["secateur.maths.sums"]),
        ("engine", ["secateur.engine.plan_memory"]),
        ("report", ["secateur.report"]),
    ]


def test_a_climb_goes_to_a_room_that_imports_the_one_before() -> None:
    path = ["cli", "engine", "maths", "engine", "report", "maths", "cli"]
    assert climbs(path, ARROWS) == [False, False, False, True, False, False, True]


def test_the_picture() -> None:
    assert picture(OPENED, ARROWS).splitlines() == [
        "  cli: app",
        "  engine: run, stream.calls",
        "  maths: sums",
        "^ engine: plan_memory",
        "  report: secateur.report",
        "6 modules in 5 stays, 4 moves, 1 climbs",
    ]


def test_modules_are_opened_by_their_first_call(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "footpath"
    package.mkdir()
    (package / "__init__.py").write_text("def gate():\n    pass\n", encoding="utf-8")
    (package / "unused.py").write_text("def never(): ...\n", encoding="utf-8")
    (package / "near.py").write_text("def step():\n    return 1\n", encoding="utf-8")
    (package / "far.py").write_text(
        "from footpath import near\ndef walk():\n    return near.step() + near.step()\n",
        encoding="utf-8",
    )
    monkeypatch.syspath_prepend(tmp_path)
    house, far = (importlib.import_module(name) for name in ("footpath", "footpath.far"))

    def work() -> None:
        far.walk()
        house.gate()
        far.walk()

    profile = sys.getprofile()
    assert opened_modules(work, package) == ["footpath.far", "footpath.near", "footpath"]
    assert sys.getprofile() is profile


def test_how_far_a_formula_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "summit"
    for room in (package, package / "foot", package / "top"):
        room.mkdir()
        (room / "__init__.py").write_text("")
    (package / "top" / "sums.py").write_text("def add():\n    return 1\n")
    (package / "foot" / "way.py").write_text(
        "from summit.top import sums\ndef walk():\n    return sums.add() + sums.add()\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    way = importlib.import_module("summit.foot.way")
    assert at_formula(way.walk, package, "top/sums.py") == (2, 2, 1)  # frames, files, moves
    with pytest.raises(RuntimeError, match=r"sums\.py"):
        at_formula(lambda: None, package, "top/sums.py")
