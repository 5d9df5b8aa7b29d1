"""What drafts gain: smaller models, heads and MTP layers, beside parents in any format.

    python -m benchmarks.speed.drafts --parent NAME=DIR --draft NAME=DIR --draft NAME=DIR ...

Times a parent with each draft and without, as `secateur bench --draft`: 64 tokens after each of
four prompts of four kinds, at temperature 0 and 1, each text without the draft and then with it. What
`secateur draft` has promised stands beside what was measured. Each call adds rows.
"""

from __future__ import annotations

import argparse
import math
from dataclasses import dataclass, field
from typing import Any

from benchmarks.hardware import add, heading, keep
from benchmarks.stored import known_rows

import secateur
from secateur.evaluation.generation import KINDS

MEASURES = tuple(
    f"src/secateur/{x}.py" for x in ("runtime/speculative", "runtime/heads", "steps/draft")
)
MINUTES = 90

NAME = "drafts"
PROTOCOL = {"new_tokens": 64, "script": "benchmarks/speed/drafts.py"}


def measured(parent: str, drafts: list[str]) -> None:
    """Time a parent with each draft and without."""
    if not known_rows(NAME, PROTOCOL):
        keep(NAME, PROTOCOL, [])
    name, _, place = parent.partition("=")
    for draft in drafts:
        label, _, where = draft.partition("=")
        found = secateur.bench(place, draft=where, new_tokens=PROTOCOL["new_tokens"])
        for one in found.speeds:
            assert one.equal is not False, f"{label} has changed the text of {name}"
            expected = found.expected[one.temperature > 0] if found.expected else None
            row = {"parent": name, "draft": label, **one.to_json(), "expected": expected}
            add(NAME, PROTOCOL, {**row, "speedup": one.speedup})
            print(name, label, one.kind, one.temperature, f"{one.speedup:.2f}", flush=True)


@dataclass
class Line:
    """A line of the table: the speed-up by kind of text, and what was expected."""

    kinds: dict[str, float] = field(default_factory=dict)
    expected: float | None = None

    @property
    def cells(self) -> list[str]:
        """With the geometric mean, where every kind was measured."""
        found = [self.kinds.get(kind) for kind in KINDS]
        mean = math.prod(self.kinds.values()) ** (1 / len(KINDS)) if None not in found else None
        return [f"{x:.2f}" if x else "" for x in (*found, mean, self.expected)]


def every(rows: list[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """How many times as fast as without the draft; of two measurements the newer one counts."""
    lines: dict[tuple[str, str, float], Line] = {}
    for row in rows:
        line = lines.setdefault((row["parent"], row["draft"], row["temperature"]), Line())
        line.kinds[row["kind"]], line.expected = row["speedup"], row.get("expected")
    columns = ["parent", "draft", "temperature", *KINDS, "geometric mean", "expected"]
    return columns, [
        [parent, draft, f"{temperature:g}", *line.cells]
        for (parent, draft, temperature), line in lines.items()
    ]


def gains(rows: list[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """All, where every kind of text was measured; a name stands in its first line."""
    columns, lines = every(rows)
    lines = [line for line in lines if all(line[:-1])]
    shown, before = [], ["", ""]
    for parent, draft, *rest in lines:
        names = [parent if parent != before[0] else "", draft if [parent, draft] != before else ""]
        shown.append([*names, *rest])
        before = [parent, draft]
    return columns, shown


def readme(rows: list[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """The speed-ups of our own smaller model beside the parent in bfloat16."""
    columns, lines = every(rows)
    own = [line[2:-2] for line in lines if line[:2] == ["SmolLM2 bfloat16", "secateur draft"]]
    return columns[2:-2], own


TABLES = {"readme": readme, "gains": gains}


def main() -> None:
    """Measure."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parent", required=True, help="NAME=FOLDER")
    parser.add_argument("--draft", action="append", required=True, help="NAME=FOLDER")
    given = parser.parse_args()
    print(heading())
    measured(given.parent, given.draft)


if __name__ == "__main__":
    main()
