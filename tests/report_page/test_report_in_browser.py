"""The report in a real browser: clicked through at phone and desktop width."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import secateur as library
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
    page = browser.new_page(
        viewport={"width": width, "height": 844}, color_scheme=scheme, reduced_motion="reduce"
    )
    said: list[str] = []
    asked: list[str] = []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("request", lambda request: asked.append(request.url))
    page.goto(page_file.as_uri())

    def background() -> str:
        return str(page.evaluate("getComputedStyle(document.body).backgroundColor"))

    before = background()
    assert (before == "rgb(20, 24, 26)") is (scheme == "dark")
    page.click("#theme")
    assert background() != before
    page.click("#theme")
    assert background() == before

    links = page.locator("nav a")
    assert links.count() == 8
    for link in links.all():
        link.click()
        target = page.locator(str(link.get_attribute("href")))
        assert target.count() == 1
        assert target.is_visible()
    for summary in page.locator("summary").all():
        summary.click()
    assert page.locator("details[open] pre").first.is_visible()

    figures = page.locator("figure[data-chart]")
    assert figures.count() == 9
    for figure in figures.all():
        assert int(figure.get_attribute("data-points") or 0) > 0
        box = figure.bounding_box()
        assert box["width"] > 200
        assert box["height"] > 60
        drawn = figure.locator("svg .mark")
        assert drawn.count() >= int(figure.get_attribute("data-points") or 0)
        assert figure.locator("svg[role=img][aria-label] > desc").count() == 1

    mark = page.locator("figure[data-chart=perplexity-1] g.s0 .mark").last
    mark.evaluate("element => element.scrollIntoView({block: 'center'})")
    page.wait_for_timeout(300)  # scrolling takes the tip away
    mark.hover()
    tip = page.locator("#tip")
    assert tip.is_visible()
    assert tip.inner_text().startswith("wanda: perplexity 65.12 at 70.0")

    wide, inner = page.evaluate("[document.documentElement.scrollWidth, innerWidth]")
    assert wide <= inner == width
    assert said == []
    assert {url for url in asked if not url.startswith("data:")} == {page_file.as_uri()}
    page.close()


def test_a_finger_reads_what_a_mouse_reads(browser: Any, page_file: Path) -> None:
    page = browser.new_page(
        viewport={"width": 390, "height": 844}, has_touch=True, reduced_motion="reduce"
    )
    page.goto(page_file.as_uri())
    for place, said in (
        (".quality code", "dataset boolq-held-out"),
        ("figure[data-chart=perplexity-1] g.s0 .hit", ": perplexity 23."),
        (".heat .mark", "q_proj, layer 0:"),
        (".bar .mark", "dense bfloat16: 257 MiB"),
    ):
        mark = page.locator(place).first
        mark.evaluate("element => element.scrollIntoView({block: 'center'})")
        page.wait_for_timeout(300)
        box = mark.bounding_box()
        page.touchscreen.tap(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
        assert page.locator("#tip").is_visible(), place
        assert said in page.locator("#tip").inner_text()
    page.close()


@pytest.mark.parametrize("width", [390, 1440])
def test_four_runs_fit_the_table(browser: Any, tmp_path: Path, width: int) -> None:
    """On 80ad24a the protocol column was clipped at both widths, without a sign."""
    names = ("sparsegpt-50-int8", "balanced-50-with-a-rather-long-name", "wanda-50", "cut-0.8")
    runs = [
        write_run(tmp_path / name, evaluation=evaluation(28.4 + i)) for i, name in enumerate(names)
    ]
    page = browser.new_page(viewport={"width": width, "height": 900})
    page.goto(report(runs, tmp_path / "report.html").page.as_uri())
    table = page.locator("table.quality")
    needed, given = table.evaluate("t => [t.scrollWidth, t.parentElement.clientWidth]")
    assert needed <= given
    for words in ("ppl-0a1b2c3d", "sparsegpt-50-int8", "28.40 ± 0.60", "31.40 ± 0.66"):
        box = table.get_by_text(words).first.bounding_box() if words[0] in "p23" else None
        if box is not None:
            assert box["x"] >= 0
            assert box["x"] + box["width"] <= width
    if width == 390:  # each value has its run beside it
        label = table.locator("td[data-of=wanda-50]").first.evaluate(
            "cell => getComputedStyle(cell, '::before').content"
        )
        assert label == '"wanda-50"'
    page.close()


@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_costs_of_an_advice_are_in_view(
    browser: Any, tmp_path: Path, width: int, scheme: str
) -> None:
    """A phone shows them, and the sign that a table goes on can be seen in the dark."""
    file = tmp_path / "advice.html"
    library.advise("llama-3.1-8b", hardware="h100-80gb", html=file)
    page = browser.new_page(viewport={"width": width, "height": 844}, color_scheme=scheme)
    page.goto(file.as_uri())
    for table in page.locator("#advice table").all():
        needed, given = table.evaluate("t => [t.scrollWidth, t.parentElement.clientWidth]")
        assert needed <= given
    for column in ("ms/token", "USD/month"):
        cell = page.locator(f'#advice td[data-of="{column}"]').first
        box = cell.bounding_box()
        assert 0 <= box["x"] <= box["x"] + box["width"] <= width
        label = "cell => getComputedStyle(cell, '::before').content"
        assert cell.evaluate(label) == (f'"{column}"' if width == 390 else "none")
    assert page.locator("#advice .notes li").count() >= 5
    # the sign that a table goes on: light on dark, dark on light
    edge = "getComputedStyle(document.querySelector('.wide')).backgroundImage"
    assert ("rgba(230, 233, 228, 0.42)" in page.evaluate(edge)) is (scheme == "dark")
    page.close()
