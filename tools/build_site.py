"""Build the documentation as a site in build/site: `make docs`, and a part of `make check`.

    python tools/build_site.py

Fails on every warning of mkdocs (a broken link or anchor, a page that is not in mkdocs.yml), on a
list or table that Markdown did not see, and on anything that a page would load from another host:
the site is read without a network.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

from site_pages import collect

ROOT = Path(__file__).resolve().parents[1]
PAGES, SITE = Path("build/pages"), Path("build/site")
LOADED = {"script": "src", "link": "href", "img": "src", "iframe": "src", "source": "src"}
REMOTE = re.compile(r"(?:https?:)?//[\w.-]+\.\w+")
MISSED = re.compile(r"^\s*(?:[-*] |\d+\. |\|.*\||```)", re.MULTILINE)


class PageFaults(HTMLParser):
    """Reads a page and collects what is wrong with it."""

    def __init__(self) -> None:
        super().__init__()
        self.faults: list[str] = []
        self.within: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Look at what an element loads."""
        if tag in ("p", "pre", "code", "script", "style", "strong", "em"):
            self.within.append(tag)
        value = dict(attrs).get(LOADED.get(tag, "")) or ""
        if REMOTE.match(value):
            self.faults.append(f"loads {value}")

    def handle_endtag(self, tag: str) -> None:
        """Leave an element."""
        if tag in self.within:
            while self.within.pop() != tag:
                pass

    def handle_data(self, data: str) -> None:
        """Look for Markdown that stayed Markdown."""
        if self.within == ["p"] and (found := MISSED.search(data)):
            line = data[found.start() :].strip().splitlines()[0]
            self.faults.append(f"no empty line before the list or table {line[:60]!r}")


def faults(site: Path) -> Iterator[str]:
    """What is wrong with the built pages and style sheets of a site."""
    for file in sorted(site.rglob("*.html")):
        reader = PageFaults()
        reader.feed(file.read_text(encoding="utf-8"))
        yield from (f"{file.relative_to(site)}: {fault}" for fault in reader.faults)
    for file in sorted(site.rglob("*.css")):
        for url in re.findall(r"(?:url\(|@import)\s*[\"']?([^\"')\s]+)", file.read_text("utf-8")):
            if REMOTE.match(url):
                yield f"{file.relative_to(site)}: loads {url}"


def main() -> None:
    """Build the site, or say what is wrong."""
    collect(ROOT, ROOT / PAGES)
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--clean"]
    built = subprocess.run(command, cwd=ROOT, env=os.environ | {"NO_MKDOCS_2_WARNING": "1"})
    if built.returncode:
        sys.exit("the site was not built: see above; mkdocs.yml lists all pages in `nav`")
    found = list(faults(ROOT / SITE))
    if found:
        sys.exit("\n".join(["the site has faults:", *found]))
    print(f"{sum(1 for _ in (ROOT / SITE).rglob('*.html'))} pages in {SITE}")


if __name__ == "__main__":
    main()
