"""The report in a real browser: clicked through at phone and desktop width."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from reporting.examples import diagnosis, evaluation, write_full_run, write_run, write_sweep
from secateur.report_page.report import report

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
pytestmark = pytest.mark.skipif(
    CHROMIUM is None, reason="no Chromium here (Debian: apt-get install chromium)"
)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """A headless Chromium."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        started = playwright.chromium.launch(
            executable_path=CHROMIUM,
            args=["--no-sandbox"] if os.geteuid() == 0 else [],
        )
        yield started
        started.close()


@pytest.fixture(scope="module")
def page_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A report over two runs and a sweep."""
    folder = tmp_path_factory.mktemp("report")
    runs = [
        write_full_run(folder / "sparsegpt-50-int8", layers=30),
        write_run(
            folder / "balanced-50-with-a-rather-long-name-that-does-not-fit-a-phone",
            layers=30,
            evaluation=evaluation(28.4, text="word" * 60),
            diagnosis=diagnosis(healthy=True),
        ),
        write_sweep(folder / "sweep"),
    ]
    return report(runs, folder / "report.html").page


@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_clicked_through(browser: Any, page_file: Path, width: int, scheme: str) -> None:
    page = browser.new_page(viewport={"width": width, "height": 844}, color_scheme=scheme)
    said: list[str] = []
    asked: list[str] = []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("request", lambda request: asked.append(request.url))
    page.goto(page_file.as_uri())

    color = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (color == "rgb(20, 24, 26)") is (scheme == "dark")
    label = page.locator("figure svg text").first.evaluate("x => getComputedStyle(x).fill")
    assert (label == "rgb(156, 167, 161)") is (scheme == "dark")  # charts follow the page

    links = page.locator("nav a")
    assert links.count() == 3
    for link in links.all():
        link.click()
        assert page.locator(str(link.get_attribute("href"))).is_visible()
    for summary in page.locator("summary").all():
        summary.click()
    assert page.locator("details[open] pre").first.is_visible()

    figures = page.locator("figure[data-chart]")
    assert figures.count() == 9
    for figure in figures.all():
        box = figure.locator("svg[role=img][aria-label]").bounding_box()
        assert box["width"] > 200
        assert box["height"] > 60

    wide, inner = page.evaluate("[document.documentElement.scrollWidth, innerWidth]")
    assert wide <= inner == width
    assert said == []
    assert {url for url in asked if not url.startswith("data:")} == {page_file.as_uri()}
    page.close()


@pytest.mark.parametrize("width", [390, 1440])
def test_a_table_of_four_runs_shows_or_scrolls_to_all(
    browser: Any, tmp_path: Path, width: int
) -> None:
    names = ("sparsegpt-50-int8", "balanced-50-with-a-rather-long-name", "wanda-50", "cut-0.8")
    runs = [
        write_run(tmp_path / name, evaluation=evaluation(28.4 + i)) for i, name in enumerate(names)
    ]
    page = browser.new_page(viewport={"width": width, "height": 900})
    page.goto(report(runs, tmp_path / "report.html").page.as_uri())
    table = page.locator(".overview table")
    for words in ("sparsegpt-50-int8", "28.40 ± 0.60", "31.40 ± 0.66"):
        cell = table.get_by_text(words).first
        cell.evaluate("cell => cell.scrollIntoView({inline: 'nearest'})")
        box = cell.bounding_box()
        assert box["x"] >= 0
        assert box["x"] + box["width"] <= width
    page.close()
