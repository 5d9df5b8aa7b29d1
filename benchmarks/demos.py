"""Results of `secateur demo`, which anybody can send in, as rows of one table.

    python -m benchmarks.demos demo-run/demo.json

A demo of the same model on the same machine takes the place of the one before.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from benchmarks.stored import Rows, alone, known_rows, write_rows

from secateur.runs.records import read_record
from secateur.steps.demo import DemoResult

MEASURES = ("src/secateur/steps/demo.py",)
MINUTES = 10


def rows_of(result: DemoResult, day: str) -> Rows:
    """A row for each way that has numbers."""
    e = result.protocol
    measured = (
        f"{e['cpu']}, {e['cpu_count']} cores, {e['threads']} threads; python {e['python']}, "
        f"torch {e['torch']}, transformers {e['transformers']}, secateur {e['secateur']}; {day}"
    )
    named: dict[str, Any] = {"model": Path(result.model).name, "machine": e["cpu"]}
    named["measured"] = measured
    return [{**named, **row.to_json()} for row in result.rows if row.failure is None]


def shown(rows: Rows) -> tuple[list[str], list[list[str]]]:
    """All demos, one after another."""
    lines = []
    for row in rows:
        size = f"{row['file_bytes'] / 2**20:.0f}" if row.get("file_bytes") else ""
        numbers = ((row.get(n), f) for n, f in (("tokens_per_second", "{:.0f}"),
            ("perplexity", "{:.2f}"), ("divergence", "{:.3f}")))  # fmt: skip
        cells = ["" if number is None else form.format(number) for number, form in numbers]
        lines.append([row["model"], row["machine"], row["way"], size, *cells])
    return ["model", "machine", "way", "MiB", "tokens/s", "perplexity", "divergence"], lines


TABLES = {"all": shown}


def main() -> None:
    """Add a demo's rows."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("result", type=Path, help="demo.json")
    parser.add_argument("--day", required=True, help="when it was made, such as 2026-12-01")
    args = parser.parse_args()
    found = rows_of(read_record(DemoResult, args.result), args.day)
    with alone():
        own = {(row["model"], row["machine"]) for row in found}
        others = [row for row in known_rows("demos") if (row["model"], row["machine"]) not in own]
        write_rows("demos", found[0]["measured"], {"script": __doc__}, [*others, *found])


if __name__ == "__main__":
    main()
