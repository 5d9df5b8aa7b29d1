"""Write the measured tables of the pages, each by the script that measured it.

    python tools/measured_tables.py
    python tools/measured_tables.py --check       # fail for what is out of date or shown nowhere
    python tools/measured_tables.py --unwritten   # tables of numbers that no script writes

A table stands between `<!-- measured: RESULT TABLE -->` and `<!-- end -->`. RESULT is a file of
`benchmarks/results`, which names the script that made it. That script has `TABLES`, from names to
functions; a function takes the rows of the result and returns the columns and the lines of a table,
all of them strings. Below each table stands where it comes from: script, day, commit, machine.

A table of numbers that nobody here measured stands between `<!-- published: SOURCE -->` and
`<!-- end -->`.

Every result must be used: by a table, by another script of `tools` or by a picture.
`benchmarks/README.md` lists them; this script writes its table.
"""

from __future__ import annotations

import importlib
import json
import re
import sys
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from house_numbers import pages
from written_files import table, write_or_check

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks/results"
LIST, LISTED = Path("benchmarks/README.md"), "## Results"
BLOCK = re.compile(r"<!-- measured: (\S+) (.+?) -->\n.*?<!-- end -->", re.DOTALL)
WRITTEN = re.compile(r"<!-- (?:measured|computed|published): .*?<!-- end -->|```.*?```", re.DOTALL)
PUNCTUATION = re.compile(r"[\d.,;:±()/%×*`~≈<>≤≥+−–-]|\bof\b|\bto\b")
UNITS = {"x", "s", "ms", "µs", "min", "h", "d", "bits", "nats", "points", "k", "M", "G", "W", "€"}
UNITS |= {power + unit for power in ("", "K", "M", "G", "T") for unit in ("B", "iB")}
NUMERIC_SHARE = 0.4
"""A table of numbers has at least this share of numbers among its cells."""


class Result(NamedTuple):
    """A file of `benchmarks/results`."""

    name: str
    content: dict[str, Any]

    @property
    def script(self) -> Any:
        """The module that made it."""
        return importlib.import_module(self.content["script"])

    @property
    def commits(self) -> str:
        """The commits that were measured."""
        found = sorted({row["commit"] for row in self.content["rows"]})
        return f"commit {found[0]}" if len(found) == 1 else f"{len(found)} commits"

    @property
    def provenance(self) -> str:
        """Where the numbers come from, in one line."""
        rows = self.content["rows"]
        headings = {row.get("measured", self.content["heading"]) for row in rows}
        machines, versions, days = map(set, zip(*(x.split("; ") for x in headings), strict=True))
        machine = next(iter(machines)) if len(machines) == 1 else "each row names its machine"
        torch = sorted({x for one in versions for x in one.split(", ") if x.startswith("torch")})
        when = " to ".join(sorted({min(days), max(days)}))
        script = self.content["script"].replace(".", "/") + ".py"
        last = f"{self.commits}: {machine}; {', '.join(torch)}"
        same = sorted({row["same_as"] for row in rows if "same_as" in row})
        last += f"; same weights: {', '.join(same)}" if same else ""
        return f"<sub>`{script}`, {when}, {last}.</sub>"

    def lines(self, name: str) -> Iterator[str]:
        """A table with its provenance."""
        columns, rows = self.script.TABLES[name](self.content["rows"])
        yield from table(columns, rows)
        yield self.provenance


def read_results() -> dict[str, Result]:
    """All results, by name."""
    files = sorted(RESULTS.glob("*.json"))
    return {f.stem: Result(f.stem, json.loads(f.read_text(encoding="utf-8"))) for f in files}


def written(text: str, results: dict[str, Result]) -> str:
    """The text of a page with its measured tables."""

    def block(found: re.Match[str]) -> str:
        name, which = found.groups()
        lines = "\n".join(results[name].lines(which))
        return f"<!-- measured: {name} {which} -->\n\n{lines}\n\n<!-- end -->"

    return BLOCK.sub(block, text)


@cache
def places() -> dict[Path, str]:
    """The text of each page and script that can show a result."""
    files = [*pages(ROOT), *(ROOT / "tools").glob("*.py"), ROOT / "benchmarks/picture.py"]
    return {file: file.read_text(encoding="utf-8") for file in files}


def users(name: str) -> list[Path]:
    """The pages and scripts that show a result."""
    named = re.compile(rf"measured: {re.escape(name)} |[\"'/]{re.escape(name)}(?:\.json)?[\"'`)]")
    return [place for place, text in places().items() if named.search(text)]


def listed(results: dict[str, Result]) -> Iterator[str]:
    """The table of `benchmarks/README.md`: script, result, pages, day and commit."""
    lines = []
    for result in sorted(results.values(), key=lambda result: result.content["script"]):
        script = result.content["script"].removeprefix("benchmarks.").replace(".", "/") + ".py"
        shown = [f"[{user.stem}](../{user.relative_to(ROOT)})" for user in users(result.name)]
        when = f"{result.content['heading'].rpartition('; ')[2]}, {result.commits}"
        own = f"[{result.name}](results/{result.name}.json)"
        lines.append((f"[{script}]({script})", own, ", ".join(shown), when))
    yield from table(("script", "result", "shown by", "measured"), lines)


def lonely(results: Iterable[str]) -> list[str]:
    """The results that nothing shows."""
    return [name for name in results if not users(name)]


def is_number(cell: str) -> bool:
    """Whether a cell has numbers and units, and nothing else."""
    return any(map(str.isdigit, cell)) and set(PUNCTUATION.sub(" ", cell).split()) <= UNITS


def unwritten() -> Iterator[str]:
    """Each table of numbers that no script writes: its page and its first line."""
    for page in pages(ROOT):
        text = WRITTEN.sub("", page.read_text(encoding="utf-8"))
        for found in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE):
            rows = [re.split(r"(?<!\\)\|", line.strip("|\n")) for line in found.splitlines()]
            cells = [cell.strip() for row in rows[2:] for cell in row[1:]]
            numbers = sum(map(is_number, cells))
            if cells and numbers >= NUMERIC_SHARE * len(cells):
                yield f"{page.relative_to(ROOT)}: {found.splitlines()[0][:90]}"


def main() -> None:
    """Write the pages, check them, or list what is old or unwritten."""
    sys.path.insert(0, str(ROOT))
    results = read_results()
    if "--unwritten" in sys.argv:
        print("\n".join(unwritten()))
        return
    texts = {
        page.relative_to(ROOT): written(page.read_text(encoding="utf-8"), results)
        for page in pages(ROOT)
    }
    own = (ROOT / LIST).read_text(encoding="utf-8").partition(LISTED)[0]
    texts[LIST] = own + LISTED + "\n\n" + "\n".join(listed(results))
    write_or_check(ROOT, texts, "measured_tables.py")
    if "--check" in sys.argv and (alone := lonely(results)):
        sys.exit(f"no page shows {', '.join(alone)}: show it, or remove it with its script")
    if "--check" in sys.argv and (by_hand := list(unwritten())):
        sys.exit("no script writes these numbers:\n" + "\n".join(by_hand))


if __name__ == "__main__":
    main()
