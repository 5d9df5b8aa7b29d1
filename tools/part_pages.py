"""Write the heads of the pages of scores: formula, paper and deviations stand in the docstrings.

python tools/part_pages.py          # write them
python tools/part_pages.py --check  # fail if one is out of date

The head of `docs/methods/NAME.md` stands between `<!-- computed: the score NAME -->` and
`<!-- end -->`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import MISSING, fields
from inspect import getdoc
from pathlib import Path

from secateur.sparsity.scores import scores
from written_files import write_or_check

ROOT = Path(__file__).resolve().parents[1]
PAGES = Path("docs/methods")
SECTION = re.compile(r"^(Args|Returns|Raises|Example):$", re.MULTILINE)
CITED = re.compile(r'"([^"]+)"((?: \([^)]*\))?), arXiv:([\d.]*\d)')
PARAMETER = re.compile(r"^    (\w+): ((?:.|\n     )+)", re.MULTILINE)


def main() -> None:
    """Write the pages, or check them."""
    texts = {}
    for name in scores:
        page = PAGES / f"{name}.md"
        if (ROOT / page).is_file():
            begin = f"<!-- computed: the score {name} -->"
            pattern = re.compile(f"{re.escape(begin)}\n.*?<!-- end -->", re.DOTALL)
            block = f"{begin}\n\n" + "\n\n".join(head(name)) + "\n\n<!-- end -->"
            text = (ROOT / page).read_text(encoding="utf-8")
            texts[page], found = pattern.subn(lambda _, block=block: block, text)
            assert found == 1, f"{page} has no place for its head"
    write_or_check(ROOT, texts, "part_pages.py")


def head(name: str) -> Iterator[str]:
    """The paragraphs of a head: formula, what it says, paper, deviations, what it gathers."""
    whole = getdoc(scores[name]) or ""
    said, *sections = SECTION.split(whole)
    first, *paragraphs = said.strip().split("\n\n")
    formula, note = re.split(r", float32 \[out, in\][;.]?\s*", first, maxsplit=1)
    yield f"```text\n{formula}\n```"
    if note:
        yield note[0].upper() + " ".join(note[1:].split())
    for paragraph in paragraphs:
        text = CITED.sub(r"[\1](https://arxiv.org/abs/\3)\2", " ".join(paragraph.split()))
        paper, _, deviations = re.sub(r"\bDeviations?: ", "\0", text).partition("\0")
        yield re.sub(r"^(Papers?|Source): ", r"**\1.** ", paper.strip())
        if deviations:
            yield f"**Deviations.** {deviations[0].upper()}{deviations[1:]}"
    gathered = ", ".join(f"`{each}`" for each in sorted(scores[name].requires))
    yield f"**Gathers** {gathered or 'nothing: no calibration text, no forward pass'}."
    named = dict(zip(sections[::2], sections[1::2], strict=True)).get("Args", "")
    said_of = {each: " ".join(text.split()) for each, text in PARAMETER.findall(named)}
    for field in fields(scores[name]):  # type: ignore[arg-type]
        default = "" if field.default is MISSING else f" = {field.default}"
        yield f"**Parameter** `{field.name}`{default}: {said_of[field.name]}"


if __name__ == "__main__":
    main()
