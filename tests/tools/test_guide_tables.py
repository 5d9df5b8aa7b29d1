"""The page of the guides' tables says what the formulas compute. `make check` compares the page."""

from __future__ import annotations

import re

import pytest

import guide_tables


def test_a_page_that_differs_fails_the_check(
    monkeypatch: pytest.MonkeyPatch, tmp_path: object
) -> None:
    monkeypatch.setattr(guide_tables, "page", lambda: "a page")
    monkeypatch.setattr(guide_tables, "ROOT", tmp_path)
    monkeypatch.setattr("sys.argv", ["guide_tables.py", "--check"])
    with pytest.raises(SystemExit, match=r"out of date: docs/guide-tables\.md"):
        guide_tables.main()


def test_the_arithmetic_that_is_shown_holds() -> None:
    """Every `a · b / c = d` of a list can be done again by a reader, within its digits."""
    shown = "\n".join(guide_tables.scenarios())
    lines = re.findall(r"^- .*?: (.*) = ([\d,.]+)(?: s| USD|,|$)", shown, re.MULTILINE)
    assert len(lines) == 9  # a request, the copies and a month in each scenario
    for formula, said in lines:
        plain = re.sub(r"[a-zA-Z,]+(?: [a-zA-Z]+)*", "", formula).replace("·", "*")
        assert eval(plain) == pytest.approx(float(said.replace(",", "")), rel=0.01, abs=0.006)
