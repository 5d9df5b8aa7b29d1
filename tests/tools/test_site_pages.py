"""The pages of the site link to nothing that the site lacks, and a fault of a page is found."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import build_site
import secateur
import site_hooks
import site_pages

ROOT = build_site.ROOT


def test_links_out_of_the_docs_lead_to_copies() -> None:
    page = Path("docs/methods/wanda.md")
    text = "[a](ria.md#x) [b](../../ARCHITECTURE.md#options) [c](../../LICENSE) [d](https://e.org)"
    relinked, files = site_pages.relinked(text, page, ROOT)
    assert relinked == (
        "[a](ria.md#x) [b](../project/ARCHITECTURE.md#options) [c](../files/LICENSE) "
        "[d](https://e.org)"
    )
    assert files == {Path("files/LICENSE"): Path("LICENSE")}


def test_the_home_page_says_what_it_is_and_leads_to_every_page() -> None:
    page = site_pages.home_page(ROOT)
    assert page.startswith("# Secateur\n")
    assert "(pictures/measured.svg)" in page
    assert "(map.md#understand-a-method)" in page
    assert "](docs/" not in page


def test_each_verb_has_a_page_of_options_and_each_flag_leads_there() -> None:
    text = (ROOT / "docs/options.md").read_text(encoding="utf-8")
    pages = site_pages.option_pages(text)
    assert "| `--scope` |" in pages[Path("options/prune.md")]
    assert "`--gguf` [bench](options/bench.md)" in pages[Path("options.md")]
    flags = re.findall(r"^\| `(--[\w-]+)`", text, re.MULTILINE)
    index = pages[Path("options.md")]
    assert [flag for flag in flags if f"`{flag}` [" not in index] == []


def test_a_flag_stays_on_one_line() -> None:
    html = "<p><code>--top-p 0.9</code></p><pre><span></span><code>x --top-p\n</code></pre>"
    assert site_hooks.on_page_content(html) == html.replace(
        "<code>--top-p", '<code><span class="flag">--top-p</span>'
    )


def test_code_is_not_relinked() -> None:
    text = "```\n[a](nowhere.md)\n```\n"
    assert site_pages.relinked(text, Path("docs/fit.md"), ROOT) == (text, {})


def test_a_link_to_nothing_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"docs/fit\.md: gone\.md is no file"):
        site_pages.relinked("[a](gone.md)", Path("docs/fit.md"), ROOT)


def test_every_public_name_has_an_entry_with_text() -> None:
    page = site_pages.python_page(ROOT)
    for name in {*secateur.__all__} - {"__version__"}:
        entry = page.partition(f"## secateur.{name}\n")[2].partition("\n## ")[0]
        assert len(entry) > 30, name
    assert "    sparsity: float | None = None," in page
    assert "- `seconds`: Start no round after this many seconds" in page


def test_assistants_are_led_to_built_pages() -> None:
    text = site_pages.assistants_page(ROOT)
    assert "(map.html)" in text
    assert "(howto/lora.html)" in text
    assert "(project/ARCHITECTURE.html)" in text
    assert ".md)" not in text


@pytest.mark.parametrize(
    ("html", "fault"),
    [
        ('<script src="https://a.org/b.js"></script>', "loads https://a.org/b.js"),
        ('<link href="//a.org/b.css">', "loads //a.org/b.css"),
        ("<p>so:\n- one\n- two</p>", "no empty line before the list or table '- one'"),
        ("<p>so:\n| a | b |</p>", "no empty line before the list or table '| a | b |'"),
    ],
)
def test_faults_of_a_page_are_found(html: str, fault: str, tmp_path: Path) -> None:
    (tmp_path / "page.html").write_text(html, encoding="utf-8")
    assert list(build_site.faults(tmp_path)) == [f"page.html: {fault}"]


def test_a_good_page_has_no_faults(tmp_path: Path) -> None:
    (tmp_path / "page.html").write_text(
        '<a href="https://a.org">a</a><script src="b.js"></script><pre>- x</pre><p>a - b</p>',
        encoding="utf-8",
    )
    assert list(build_site.faults(tmp_path)) == []
