"""The report of fits and drafts."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from report_page.test_report import Page
from reporting.examples import write_draft, write_fit, write_full_run
from secateur.errors import CheckpointError
from secateur.report_page.report import report
from secateur.reporting.fit import FitResult
from secateur.runs.records import read_record


def page_of(tmp_path: Path, *places: Path, **options: Any) -> Page:
    """The report of some places, taken apart."""
    file = report(places, tmp_path / "report.html", **options).page
    return Page(file.read_text(encoding="utf-8"))


def test_a_fit_is_shown(tmp_path: Path) -> None:
    page = page_of(tmp_path, write_fit(tmp_path / "small"), write_full_run(tmp_path / "run"))
    for text in (
        "0 +0.0900 ± 0.0042",  # the loss in the first table
        "--max-size 70.0 MiB 67.0 MiB",
        "3 50% zeros, int4",
        "predicted: all formats",
        "secateur push small OWNER/NAME",  # a command keeps all of its words
    ):
        assert text in page.text, text
    assert "frontier-small" in page.charts


@pytest.mark.parametrize(("speedup", "pays"), [(1.42, True), (1.01, False)])
def test_a_draft_says_what_it_brings(tmp_path: Path, speedup: float, pays: bool) -> None:
    page = page_of(tmp_path, write_draft(tmp_path / "draft", speedup=speedup))
    assert f"{speedup:.2f} x with 3 proposed" in page.text
    assert "8,192 of 49,152 tokens" in page.text
    assert "0.730 ± 0.010" in page.text
    assert ("no draft pays" in page.text) is not pays


def test_the_chart_of_a_fit_shows_every_finalist(tmp_path: Path) -> None:
    result = read_record(FitResult, write_fit(tmp_path / "small") / "secateur" / "fit.json")
    first, second = result.finalists
    more = [replace(second, name=f"a cut, {n}", file_bytes=n << 20) for n in (45, 50, 65)]
    result = result.model_copy(update={"finalists": (*more, first, second)})
    shown = {
        point
        for series in result.chart().series
        if series.name in ("made", "the winner")
        for point in series.points
    }
    assert shown == {(x.file_bytes / 2**20, x.last) for x in result.finalists}
    assert len(shown) == 5


def test_a_broken_bound_is_said(tmp_path: Path) -> None:
    folder = write_fit(tmp_path / "small", kept=False)
    result = read_record(FitResult, folder / "secateur" / "fit.json")
    assert len(result.broken) == 1
    assert result.broken[0] in page_of(tmp_path, folder).text


def test_a_damaged_fit_is_refused(tmp_path: Path) -> None:
    folder = write_fit(tmp_path / "small")
    (folder / "secateur" / "fit.json").write_text('{"output": "x"}')
    with pytest.raises(CheckpointError, match=r"fit\.json"):
        report([folder], tmp_path / "r.html")
