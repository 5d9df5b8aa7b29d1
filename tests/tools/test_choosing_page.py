"""The decision page says what the benchmarks measured, and its commands exist."""

from __future__ import annotations

import pytest

import choosing_page
from secateur.recipes.verbs import VERBS


def test_the_page_is_up_to_date() -> None:
    """If not: `python tools/choosing_page.py`."""
    place = choosing_page.ROOT / choosing_page.PAGE
    assert place.read_text(encoding="utf-8") == choosing_page.page()


def test_a_page_that_differs_fails_the_check(
    monkeypatch: pytest.MonkeyPatch, tmp_path: object
) -> None:
    page = choosing_page.page()
    monkeypatch.setattr(choosing_page, "ROOT", tmp_path)
    monkeypatch.setattr(choosing_page, "page", lambda: page)
    monkeypatch.setattr("sys.argv", ["choosing_page.py", "--check"])
    with pytest.raises(SystemExit, match=r"out of date: docs/choosing\.md"):
        choosing_page.main()


def test_numbers_are_those_of_the_rows() -> None:
    """Two cells, looked up here in another way."""
    rows = choosing_page.rows("presets")
    best = [
        r["perplexity"]["wikitext2"]
        for r in rows
        if r["row"] == "best, 98,304 tokens" and r["column"] == "2:4"
    ]
    start = "| an earlier `best`, 98,304 tokens"
    line = next(x for x in choosing_page.presets() if x.startswith(start))
    assert f"| {sum(best) / len(best):.1f} |" in line
    speeds = [r for r in choosing_page.rows("int4-models") if r["contender"] == "dense int4"]
    line = next(x for x in choosing_page.low_bits() if x.startswith("| int4 |"))
    assert all(f"| {r['tokens_per_second']:.0f} |" in line for r in speeds)


def test_every_command_names_a_verb() -> None:
    assert {words.split()[0] for _, _, words in choosing_page.WAYS} <= VERBS.keys()
