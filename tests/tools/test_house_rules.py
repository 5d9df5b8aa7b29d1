"""The house rules find what they forbid, and the map shows what is there."""

from __future__ import annotations

import ast
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

import house_map
import house_rules
from house_numbers import (
    Module,
    lines_by_kind,
    named_once,
    neighbours,
    numbers,
    read_modules,
    sizes,
    twins,
)

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


def violations(
    house: Path, allowed: Mapping[str, str], to_fix: frozenset[str] = frozenset()
) -> list[str]:
    imports = house_map.module_imports(house)
    return house_rules.violations(read_modules(house), imports, allowed, to_fix)


def write(house: Path, file: str, text: str) -> None:
    (house / "cottage" / file).write_text(text, encoding="utf-8")


def broken(house: Path, file: str, text: str) -> list[str]:
    write(house, file, text)
    return violations(house, {})


def test_a_house_without_violations(house: Path) -> None:
    assert violations(house, {}) == []


def test_lines_of_modules(house: Path) -> None:
    assert broken(house, "garden/long.py", "x = 1\n" * 800) == []
    assert broken(house, "garden/long.py", "x = 1\n" * 801) == [
        "cottage/garden/long.py: has 801 lines, more than 800"
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
    assert violations(house, {"Table": "one for each room"}) == []


def test_exceptions_that_are_not_needed(house: Path) -> None:
    assert violations(house, {"Chair": "two of them"}, frozenset({"cottage/garden/long.py"})) == [
        "class Chair: is in one module only: delete it from SHARED_CLASS_NAMES",
        "cottage/garden/long.py: is fixed; delete it from TO_FIX",
    ]


def counted_neighbours(house: Path) -> list[str]:
    found = neighbours(read_modules(house), house_map.module_imports(house))
    return [one.path.removeprefix("cottage/") for one, _ in found]


def test_neighbours_are_in_one_folder_and_have_one_importer(house: Path) -> None:
    assert counted_neighbours(house) == []  # the table is imported from another room
    write(house, "garden/bench.py", "")
    write(house, "kitchen/cook.py", "from cottage.kitchen.table import Table\n")
    assert counted_neighbours(house) == ["kitchen/table.py"]
    write(house, "kitchen/guest.py", "from cottage.kitchen import table\n")
    assert counted_neighbours(house) == []


def test_what_a_package_gathers_or_registers_is_no_neighbour(house: Path) -> None:
    write(house, "garden/bench.py", "")
    write(house, "kitchen/__init__.py", "from cottage.kitchen.table import Table\n")
    assert counted_neighbours(house) == []
    write(house, "kitchen/__init__.py", "")
    write(house, "kitchen/cook.py", "from cottage.kitchen.table import Table\n")
    assert counted_neighbours(house) == ["kitchen/table.py"]
    write(house, "kitchen/__init__.py", 'tables = Registry("table", __name__)\n')
    assert counted_neighbours(house) == []
    write(house, "kitchen/__init__.py", "")
    write(house, "garden/bench.py", 'tables = Registry("table", "cottage.kitchen")\n')
    assert counted_neighbours(house) == []


def test_a_package_is_in_a_folder_of_its_own(house: Path) -> None:
    write(house, "garden/bench.py", "")
    (house / "cottage" / "kitchen" / "drawer").mkdir()
    write(house, "kitchen/drawer/__init__.py", "from cottage.kitchen.table import Table\n")
    assert counted_neighbours(house) == []


FIVE = "".join(f"    {name}: int\n" for name in "abcde")


def counted_twins(house: Path, text: str) -> list[tuple[str, str, list[str]]]:
    write(house, "garden/bench.py", text)
    return [(one.name, other.name, shared) for one, other, shared in twins(read_modules(house))]


def test_twins_have_five_fields_of_the_same_name(house: Path) -> None:
    write(house, "kitchen/table.py", f"class Table:\n{FIVE}    legs: int\n")
    five, four = f"class Bench:\n{FIVE}", f"class Bench:\n{FIVE}".replace("e: int", "e = 0")
    assert counted_twins(house, five) == [("Bench", "Table", list("abcde"))]
    assert counted_twins(house, four) == []
    assert counted_twins(house, five.replace("e: int", "e: ClassVar[int]")) == []


def test_a_subclass_and_a_protocol_are_no_twins(house: Path) -> None:
    write(house, "kitchen/table.py", f"class Table:\n{FIVE}")
    between = "class Seat(Table[int]): ...\n"
    assert counted_twins(house, f"{between}class Bench(garden.Seat):\n{FIVE}") == []
    assert counted_twins(house, f"class Bench(Protocol):\n{FIVE}") == []


def counted_once(house: Path, text: str) -> list[str]:
    write(house, "garden/bench.py", text)
    return [x.name for x in named_once(read_modules(house))]


def test_functions_that_are_named_once(house: Path) -> None:
    twice = "def sit(): ...\nsit()\nsit()\n"
    assert counted_once(house, twice) == []
    assert counted_once(house, twice.removesuffix("sit()\n")) == ["sit"]
    assert counted_once(house, "def sit(): ...\ndef rest():\n    sit()\n    rest()\n") == ["sit"]
    assert counted_once(house, "def _sit(): ...\n_sit()\nsit = 1\n") == []  # a shorter name
    assert counted_once(house, "class Bench:\n    def sit(self): ...\nBench().sit()\n") == []
    assert counted_once(house, "from cottage.kitchen.table import lay\nlay()\n") == []
    write(house, "kitchen/table.py", "def lay(): ...\n")
    assert counted_once(house, "from cottage.kitchen import table\ntable.lay()\n") == ["lay"]


EVERY_KIND = '''"""Doc.

More.
"""

import sys
from os import (
    path,
)

__all__ = ["Bench"]


# why
class Bench:
    """Doc."""

    legs: int = 4  # two for each end
    """A field."""
    text = """
    A string.
    """
'''


def test_lines_by_kind(house: Path) -> None:
    write(house, "garden/bench.py", EVERY_KIND)
    (bench,) = (x for x in read_modules(house) if x.path == "cottage/garden/bench.py")
    kinds = {"docstring": 6, "import": 4, "__all__": 1, "comment": 1, "blank": 5, "statement": 5}
    assert lines_by_kind(bench) == kinds
    assert bench.lines == 22 == sum(kinds.values())


def test_the_numbers_of_a_house(house: Path) -> None:
    before = numbers(read_modules(house), house_map.module_imports(house))
    assert before == {
        "source files": 5,
        "modules that only their neighbour imports": 0,
        "pairs of classes with five equal fields": 0,
        "percent of lines that import": 50.0,
        "lines of statements": 1,
        "functions named in one place": 0,
    }
    write(house, "garden/seat.py", f"class Seat:\n{FIVE}def sit(): ...\n")
    write(house, "garden/bench.py", "from cottage.garden.seat import sit\n" * 8 + "sit()\n")
    write(house, "kitchen/table.py", f"class Table:\n{FIVE}")
    today = numbers(read_modules(house), house_map.module_imports(house))
    assert len(house_rules.risen(today, before)) == len(before) - 1  # a smaller share imports
    assert house_rules.risen(before, before) == []


def test_sizes_leave_out_empty_packages() -> None:
    parts = [Module("x.py", ["x = 1"] * lines, ast.parse("")) for lines in range(0, 105)]
    assert sizes(parts) == (54, 94)


def test_a_number_that_rises_is_a_violation_and_one_that_falls_is_not() -> None:
    most = {"files": 10, "percent": 8.4}
    assert house_rules.risen({"files": 11, "percent": 8.4}, most) == ["files: 11, more than 10"]
    assert house_rules.risen({"files": 9, "percent": 8.5}, most) == ["percent: 8.5, more than 8.4"]
    lines = house_rules.table({"files": 9, "percent": 8.4}, most).splitlines()
    assert ["lower the ratchet to 9" in line for line in lines] == [False, True, False]


def test_lowering_only_lowers(tmp_path: Path) -> None:
    file = tmp_path / "rules.py"
    file.write_text('RATCHETS = {\n    "files": 10,\n    "percent": 8.4,\n}\n', encoding="utf-8")
    assert house_rules.lower(file, {"files": 11, "percent": 8.3}) == ["percent"]
    assert file.read_text(encoding="utf-8") == (
        'RATCHETS = {\n    "files": 10,\n    "percent": 8.3,\n}\n'
    )


def test_every_ratchet_can_be_lowered(tmp_path: Path) -> None:
    file = tmp_path / "rules.py"
    file.write_text(Path(house_rules.__file__).read_text(encoding="utf-8"), encoding="utf-8")
    names = list(house_rules.RATCHETS)
    assert house_rules.lower(file, dict.fromkeys(names, 0)) == names
    assert house_rules.lower(file, dict.fromkeys(names, 0)) == []


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
