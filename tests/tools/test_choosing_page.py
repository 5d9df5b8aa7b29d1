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
    """Some cells, looked up here in another way."""
    rows = choosing_page.rows("presets")
    wanda = [
        r["perplexity"]["wikitext2"] for r in rows if r["row"] == "wanda" and r["column"] == "2:4"
    ]
    line = next(x for x in choosing_page.presets() if x.startswith("| Wanda |"))
    assert f"| {sum(wanda) / len(wanda):.1f} |" in line
    large = next(
        r
        for r in choosing_page.rows("int4-models")
        if (r["contender"], r["model"]) == ("dense int4", "1.1b")
    )
    line = next(x for x in choosing_page.low_bits() if x.startswith("| int4 |"))
    assert f"| {large['tokens_per_second']:.0f} |" in line


def test_speeds_and_sizes_are_those_of_the_first_page() -> None:
    """One question has one answer: the cells stand in the README's table too."""
    readme = (choosing_page.ROOT / "README.md").read_text(encoding="utf-8")
    cells = {
        cells[1].strip(): [cell.strip() for cell in cells[2:-1]]
        for line in readme.splitlines()
        if line.startswith("| ")
        for cells in [line.split("|")]
    }
    page = {
        words[1].strip(): words[3].strip()
        for line in choosing_page.low_bits()
        if line.startswith("| ")
        for words in [line.split("|")]
    }
    for row in ("int8", "int4", "50 % zeros, int8", "50 % zeros, int4"):
        name = row if "zeros" in row else f"no zeros, {row}"
        assert cells[name][1] == page[row]
    mib = {name: float(cells[f"no zeros, {name}"][0].split()[0]) for name in ("int8", "int4")}
    whole = float(cells["no zeros, bfloat16, in torch"][0].split()[0])
    for name, words in choosing_page.stored_shares().items():
        if name in mib:
            assert words.endswith(f"({mib[name] / whole:.0%})")
    assert choosing_page.stored_shares()["int4"].startswith("a third")


def test_every_command_names_a_verb() -> None:
    assert {words.split()[0] for _, _, words in choosing_page.WAYS} <= VERBS.keys()
