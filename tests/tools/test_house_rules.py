"""The house rules find what they forbid, and the map shows what is there."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

import house_map
from house_rules import violations

LONG = "def long():\n" + '    """Doc.\n' + "    line\n" * 5 + '    """\n' + "    x = 1\n" * 60


@pytest.fixture
def house(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package with two rooms that break no rule."""
    monkeypatch.setattr(house_map, "PACKAGE", "cottage")
    for file, text in {
        "__init__.py": "",
        "kitchen/__init__.py": "",
        "kitchen/table.py": "class Table: ...\n",
        "garden/__init__.py": "",
        "garden/bench.py": "from cottage.kitchen.table import Table\n",
    }.items():
        path = tmp_path / "cottage" / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return tmp_path


def broken(house: Path, file: str, text: str) -> list[str]:
    (house / "cottage" / file).write_text(text, encoding="utf-8")
    return violations(house, {}, frozenset())


def test_a_house_without_violations(house: Path) -> None:
    assert violations(house, {}, frozenset()) == []


def test_lines_of_modules(house: Path) -> None:
    assert broken(house, "garden/long.py", "x = 1\n" * 420) == []
    assert broken(house, "garden/long.py", "x = 1\n" * 421) == [
        "cottage/garden/long.py: has 421 lines, more than 420"
    ]


def test_lines_of_functions_are_counted_without_the_docstring(house: Path) -> None:
    assert broken(house, "garden/long.py", LONG.removesuffix("    x = 1\n")) == []
    assert broken(house, "garden/long.py", LONG) == [
        "cottage/garden/long.py:long: has 61 lines without docstring, more than 60"
    ]


def test_circles_of_modules_for_type_checkers_too(house: Path) -> None:
    back = (
        "from typing import TYPE_CHECKING\n"
        "if TYPE_CHECKING:\n    from cottage.garden import bench\n"
    )
    assert broken(house, "kitchen/table.py", back) == [
        "cottage.garden.bench cottage.kitchen.table: import each other in a circle",
        "cottage.garden cottage.kitchen: import each other in a circle",
    ]


def test_circles_of_rooms_whose_modules_have_none(house: Path) -> None:
    (house / "cottage" / "garden" / "path.py").write_text("", encoding="utf-8")
    assert broken(house, "kitchen/door.py", "import cottage.garden.path\n") == [
        "cottage.garden cottage.kitchen: import each other in a circle"
    ]


def test_class_names(house: Path) -> None:
    assert broken(house, "garden/table.py", "class Table: ...\n") == [
        "class Table: is defined in cottage/garden/table.py, cottage/kitchen/table.py"
    ]
    assert violations(house, {"Table": "one for each room"}, frozenset()) == []


def test_exceptions_that_are_not_needed(house: Path) -> None:
    assert violations(house, {"Chair": "two of them"}, frozenset({"cottage/garden/long.py"})) == [
        "class Chair: is in one module only: delete it from SHARED_CLASS_NAMES",
        "cottage/garden/long.py: is fixed; delete it from TO_FIX",
    ]


def test_the_map(house: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(house_map, "OPENED", ("cottage",))
    path = list(sys.path)
    assert house_map.picture(house_map.module_imports(house)).splitlines() == [
        "cottage: 2 rooms, 1 arrows",
        "  garden (2 modules) -> kitchen",
        "  kitchen (2 modules) -> nothing",
        "5 modules, 1 imports between them, 0 circles",
    ]
    assert sys.path == path
