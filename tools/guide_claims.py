"""Write docs/guide-claims.md: what common guides say about pruning, and what is right.

    python tools/guide_claims.py          # write the page
    python tools/guide_claims.py --check  # fail if it is out of date

`guide_claims.yaml` has the texts. A number that was measured here is not in it: the text says where
it stands in `benchmarks/results`, and this script looks it up. So a number of ours that no
benchmark has cannot be written.
"""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml

from written_files import write_or_check

ROOT = Path(__file__).resolve().parents[1]
PAGE, CLAIMS = Path("docs/guide-claims.md"), Path("tools/guide_claims.yaml")
RESULTS = Path("benchmarks/results")
LOOKED_UP = re.compile(r"\{([^{}]*\|[^{}]*)\}")


def main() -> None:
    """Write the page, or check it."""
    write_or_check(ROOT, {PAGE: page()}, "guide_claims.py")


def page() -> str:
    """The text of the page."""
    topics = yaml.safe_load((ROOT / CLAIMS).read_text(encoding="utf-8"))
    numbers = sorted(claim["number"] for claims in topics.values() for claim in claims)
    if numbers != list(range(1, len(numbers) + 1)):
        raise ValueError(f"{CLAIMS}: a number is missing or is given twice")
    lines = list(head(len(numbers)))
    position = 0
    for topic, claims in topics.items():
        lines += [f"## {topic}", ""]
        for claim in claims:
            position += 1
            lines += entry(claim, position)
    return "\n".join(lines).rstrip() + "\n"


def head(count: int) -> Iterable[str]:
    """What the page is."""
    yield "# What common guides get wrong"
    yield ""
    yield (
        f"This page takes {count} claims that are common in guides to pruning and says what is "
        "right. `python tools/guide_claims.py` writes it. Numbers measured here come from "
        "`benchmarks/results`, and the page names the file; all others name their source. Facts "
        "about tools are of November 2026."
    )
    yield ""
    yield (
        "The tables of the same guides (costs, sizes, speed, prices) are computed again on "
        "[a page of their own](guide-tables.md). SmolLM2-135M is a small model, and small models "
        "lose the most; perplexity is that of WikiText-2 unless another text is named."
    )
    yield ""


def entry(claim: dict[str, Any], position: int) -> Iterable[str]:
    """One claim and its answer; `position` is its number on the page."""
    files: list[str] = []

    def looked_up(match: re.Match[str]) -> str:
        file, text = found(match[1])
        files.append(file)
        return text

    right = LOOKED_UP.sub(looked_up, claim["right"])
    measured = [f"[{name}.json](../{RESULTS}/{name}.json)" for name in dict.fromkeys(files)]
    sources = [f"measured: {', '.join(measured)}"] if measured else []
    sources += [claim["source"]] if claim["source"] else []
    if not sources:
        raise ValueError(f"claim {claim['number']} names no source")
    yield f"**{position}. Guides say:** {claim['claim']}"
    yield ""
    yield f"{right} *({'; '.join(sources)})*"
    yield ""


def found(words: str) -> tuple[str, str]:
    """A measured number.

    Args:
        words: `FILE | CONDITIONS | PATH | FORMAT`. With a second pair of conditions and path, its
            value is taken off.

    Returns:
        The name of the file, and the number as text.

    Raises:
        ValueError: no row of the file meets the conditions, or one has no such value.
    """
    file, *pairs, form = (part.strip() for part in words.split("|"))
    rows = json.loads((ROOT / RESULTS / f"{file}.json").read_text(encoding="utf-8"))["rows"]
    values = []
    for conditions, path in zip(pairs[::2], pairs[1::2], strict=True):
        wanted = dict(pair.split("=") for pair in conditions.split("; ") if pair)
        chosen = [row for row in rows if all(meets(row.get(k), v) for k, v in wanted.items())]
        if not chosen:
            raise ValueError(f"{file}.json has no row with {conditions}")
        values.append(statistics.mean(value(row, path) for row in chosen))
    return file, format(values[0] - sum(values[1:]), form)


def meets(measured: Any, wanted: str) -> bool:
    """Whether a row has the wanted value. Numbers are compared to three digits."""
    if isinstance(measured, float):
        return abs(measured - float(wanted)) < 1e-3
    return str(measured) == wanted


def value(row: dict[str, Any], path: str) -> float:
    """A number of a row; dots lead into what it holds."""
    held: Any = row
    for key in path.split("."):
        held = held[key]
    if not isinstance(held, int | float):
        raise ValueError(f"{path} is no number: {held!r}")
    return float(held)


if __name__ == "__main__":
    main()
