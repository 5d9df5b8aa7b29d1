"""The pages of the site link to nothing that the site lacks, and a fault of a page is found."""

from __future__ import annotations

from pathlib import Path

import pytest

import build_site
import secateur
import site_hooks
import site_pages
from option_files import pages as option_pages
from secateur.recipes.options import all_options
from secateur.recipes.verbs import VERBS, imported

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


def test_every_option_is_explained_on_the_page_of_its_verb() -> None:
    pages = option_pages()
    index = pages["options.md"]
    for name, verb in VERBS.items():
        page = pages[f"options/{name}.md"]
        for option in all_options(imported(verb.recipe)):
            assert option.help
            assert option.help.replace("|", r"\|") in page
            shown = option.is_word or option.flag.hidden
            assert shown or f"`--{option.name.replace('_', '-')}`" in page
            assert shown or f"[{name}](options/{name}.md)" in index


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
    assert "- `rounds`: Largest" in page


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
