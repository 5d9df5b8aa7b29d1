"""Write docs/papers.bib: the BibTeX of the papers on docs/reading-list.md.

    python tools/bibliography.py          # write the file
    python tools/bibliography.py --check  # fail if it is out of date

The reading list is the source, so a paper is written down once. It gives surnames and years; a
paper without a link to arXiv has no number.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from written_files import write_or_check

ROOT = Path(__file__).resolve().parents[1]
LIST, FILE = Path("docs/reading-list.md"), Path("docs/papers.bib")
LINKED = re.compile(
    r"^(?:- |\| )(.+?) (\d{4}), \[(.+?)\]\(https://arxiv\.org/abs/(\d+\.\d+)\)", re.MULTILINE
)
PRINTED = re.compile(r"^- (.+?) (\d{4}), (?!\[)(.+?) \((?:\w+; )?(\w+)\)$", re.MULTILINE)


class Paper(NamedTuple):
    """One entry."""

    authors: str
    year: str
    title: str
    source: str

    @property
    def key(self) -> str:
        """Such as `sun2023simple`: first author, year, first word that says something."""
        first = re.split(r",| et al", self.authors)[0]
        words = [w for w in re.findall(r"\w+", self.title) if w.lower() not in STOP]
        return plain(f"{first}{self.year}{words[0]}")

    @property
    def entry(self) -> str:
        """The entry in BibTeX."""
        names = self.authors.replace(" et al.", ", others").split(", ")
        arxiv = self.source[0].isdigit()
        fields = {
            "author": " and ".join(names),
            "title": f"{{{self.title}}}",
            "year": self.year,
            **({"eprint": self.source, "archivePrefix": "arXiv"} if arxiv else
               {"booktitle": self.source}),
        }  # fmt: skip
        lines = [f"  {name} = {{{value}}}," for name, value in fields.items()]
        return "\n".join([f"@{'misc' if arxiv else 'inproceedings'}{{{self.key},", *lines, "}"])


STOP = frozenset({"a", "an", "the", "to", "of", "on", "for", "and", "or", "via", "are", "what"})


def plain(text: str) -> str:
    """Lower case, without accents and spaces."""
    letters = unicodedata.normalize("NFKD", text.lower())
    return "".join(c for c in letters if c.isascii() and c.isalnum())


def papers(text: str) -> Iterator[Paper]:
    """All papers of the list."""
    for pattern in (LINKED, PRINTED):
        yield from (Paper(*found) for found in pattern.findall(text))


def page() -> str:
    """The text of the file."""
    found = sorted(papers((ROOT / LIST).read_text(encoding="utf-8")), key=lambda paper: paper.key)
    keys = [paper.key for paper in found]
    twice = {key for key in keys if keys.count(key) > 1}
    if twice:
        raise ValueError(f"{LIST}: two papers have the key {', '.join(sorted(twice))}")
    return "\n\n".join(paper.entry for paper in found) + "\n"


def main() -> None:
    """Write the file, or check it."""
    write_or_check(ROOT, {FILE: page()}, "bibliography.py")


if __name__ == "__main__":
    main()
