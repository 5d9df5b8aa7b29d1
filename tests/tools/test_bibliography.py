"""Every paper of the reading list has an entry in BibTeX."""

from __future__ import annotations

import re

import bibliography

ROOT = bibliography.ROOT


def test_the_file_is_up_to_date() -> None:
    """If not: `python tools/bibliography.py`."""
    assert (ROOT / bibliography.FILE).read_text(encoding="utf-8") == bibliography.page()


def test_no_paper_is_left_out() -> None:
    text = (ROOT / bibliography.LIST).read_text(encoding="utf-8")
    found = list(bibliography.papers(text))
    assert len(re.findall(r"^- \w.*\d{4}, ", text, re.M)) + 5 == len(found)
    numbers = re.findall(r"arxiv\.org/abs/([\d.]+\d)", text)
    assert sorted(numbers) == sorted(p.source for p in found if p.source[0].isdigit())


def test_an_entry() -> None:
    line = (
        "| Sun, Liu, Bair, Kolter 2023, [A Simple Way](https://arxiv.org/abs/2306.11695) | so |\n"
    )
    assert next(bibliography.papers(line)).entry == (
        "@misc{sun2023simple,\n"
        "  author = {Sun and Liu and Bair and Kolter},\n"
        "  title = {{A Simple Way}},\n"
        "  year = {2023},\n"
        "  eprint = {2306.11695},\n"
        "  archivePrefix = {arXiv},\n"
        "}"
    )
    line = "- Zhang et al. 2024, Plug-and-Play: An Efficient Method (RIA; ICLR)\n"
    entry = next(bibliography.papers(line)).entry
    assert entry.startswith("@inproceedings{zhang2024plug,\n  author = {Zhang and others},\n")
    assert "booktitle = {ICLR}" in entry
