"""A view becomes tables and lines: labels, fields and formats."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from secateur.reporting import fields
from secateur.reporting.fields import Result
from secateur.reporting.tables import Line, Table


class Shown(Result):
    name: str
    nbytes: int | None = None
    parts: tuple[dict[str, Any], ...] = ()

    view = """
        {name}
            size | {nbytes:size}
            first | {parts[0][n]}
        parts << parts
            part || n | error | spare
            {part} | {n} | {n:.1f}< ± {error:.2f}> | {spare}
        >dim> all of {name}
        > {part}: {n} << parts
    """


PARTS = [
    {"part": "a", "n": 1, "error": 0.5, "style": "bold"},
    {"part": "b", "n": 2, "error": None},
]


def test_a_view_of_everything() -> None:
    assert Shown(name="x <b> {y}", nbytes=2**20, parts=tuple(PARTS)).tables() == [
        Table("x <b> {y}", ("", ""), (("size", "1.0 MiB"), ("first", "1")), 2),
        Table(
            "parts", ("part", "n", "error"), (("a", "1", "1.0 ± 0.50"), ("b", "2", "2.0")), 1,
            ("bold", ""),
        ),
        Line("all of x <b> {y}", "dim"), Line("a: 1"), Line("b: 2"),
    ]  # fmt: skip


def test_what_has_no_value_is_left_out() -> None:
    assert Shown(name="x").tables() == [Line("all of x", "dim")]


def test_a_field_that_no_record_has_is_an_error() -> None:
    with pytest.raises(AttributeError, match="sise"):
        fields.filled("{sise}", Shown(name="x"))


def test_every_result_has_a_view_or_makes_its_tables() -> None:
    text = Path(fields.__file__).with_name("fields.txt").read_text(encoding="utf-8")
    kinds, waiting = set[type[Result]](), [*Result.__subclasses__()]
    while waiting:
        kind = waiting.pop()
        kinds.add(kind)
        waiting += kind.__subclasses__()
    own = {kind for kind in kinds if kind.__module__.startswith("secateur.")}
    leaves = {
        kind.__name__ for kind in own if not kind.__subclasses__() and "tables" not in vars(kind)
    }
    assert {name for name in leaves if f"[{name}]" not in text} == set()
