"""The pages of the documentation: commands have the options they name, links lead somewhere."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DOCS = sorted((ROOT / "docs").rglob("*.md"))
PAGES = [*DOCS, *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "llms.txt"))]
COMMAND = re.compile(r"\bsecateur ([a-z]+)\b([^`\n#]*)")
OPTION = re.compile(r"--[a-z0-9]+(?:-[a-z0-9]+)*")


def written(page: Path) -> str:
    """The text of a page, lines that are continued joined."""
    return page.read_text(encoding="utf-8").replace("\\\n", "")


def named(page: Path) -> str:
    return str(page.relative_to(ROOT))


def anchors(page: Path) -> set[str]:
    """The names that links can give to the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", text.lower()).strip().replace(" ", "-") for text in headings}


def test_commands_have_the_options_they_name(secateur, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    used: dict[str, dict[str, str]] = {}
    for page in PAGES:
        for verb, rest in COMMAND.findall(written(page)):
            for option in re.findall(rf"(?<!\S){OPTION.pattern}", rest):
                used.setdefault(verb, {})[option] = named(page)
    assert used["prune"]
    unknown = {
        f"{page}: secateur {verb} {option}"
        for verb, options in used.items()
        for known in [OPTION.findall(secateur(verb, "--help").out)]
        for option, page in options.items()
        if option not in known
    }
    assert unknown == set()


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_links_lead_somewhere(page):
    for link in re.findall(r"\]\(([^)\s]+)\)", re.sub(r"```.*?```", "", written(page), flags=re.S)):
        path, _, anchor = link.partition("#")
        if "://" in link:
            continue
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


def test_every_paper_is_on_the_reading_list():
    paper = re.compile(r"arxiv\.org/abs/([0-9]+\.[0-9]+)")
    listed = paper.findall(written(ROOT / "docs" / "reading-list.md"))
    linked = {number for page in PAGES for number in paper.findall(written(page))}
    assert linked - set(listed) == set()
    assert len(listed) == len(set(listed))


@pytest.mark.parametrize("page", DOCS, ids=named)
def test_a_page_opens_with_a_sentence(page):
    """What the reader gets from it comes first: no code, no table, no list."""
    title, _, rest = written(page).partition("\n")
    assert title.startswith("# ")
    text = re.sub(r"<!--.*?-->", "", rest, flags=re.S).strip()
    assert re.match(r"[A-Z`]", text), text[:60]
