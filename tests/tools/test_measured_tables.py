"""Measured tables say what the results say, and every result is shown."""

from __future__ import annotations

from pathlib import Path

import pytest

import measured_tables
from house_numbers import pages
from measured_tables import ROOT, Result, lonely, read_results, unwritten, written

RESULTS = read_results()


@pytest.mark.parametrize("page", pages(ROOT), ids=lambda page: page.stem)
def test_a_page_says_what_was_measured(page: Path) -> None:
    """If not: `python tools/measured_tables.py`."""
    text = page.read_text(encoding="utf-8")
    assert written(text, RESULTS) == text


@pytest.mark.parametrize("result", RESULTS.values(), ids=[*RESULTS])
def test_a_result_names_its_script_and_what_it_measures(result: Result) -> None:
    assert all(len(row["commit"]) >= 8 for row in result.content["rows"])
    assert all((ROOT / path).exists() for path in result.script.MEASURES)
    assert result.script.MINUTES > 0


def test_every_result_is_shown() -> None:
    assert lonely(RESULTS) == []
    assert lonely(["nowhere"]) == ["nowhere"]


def test_tables_of_numbers_that_no_script_writes_are_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    numbers = "| a | b |\n|---|---|\n| x | 3.14 |\n| y | 2 MiB |\n"
    words = "| a | b |\n|---|---|\n| x | `yes` |\n| y | 2 ways |\n"
    monkeypatch.setattr(measured_tables, "ROOT", tmp_path)
    (tmp_path / "docs").mkdir()
    page = tmp_path / "README.md"
    for text, count in {
        numbers: 1,
        words: 0,
        f"<!-- published: somebody, 2024 -->\n{numbers}\n<!-- end -->\n": 0,
        f"```\n{numbers}```\n": 0,
    }.items():
        page.write_text(text, encoding="utf-8")
        assert len(list(unwritten())) == count, text
