"""What a benchmark was run on, and where its results go."""

from __future__ import annotations

import datetime
import fcntl
import json
import os
from pathlib import Path
from typing import Any

import torch

from secateur.reporting.manifest import environment

RESULTS = Path(__file__).parent / "results"


def heading() -> str:
    """One line on hardware, versions and day."""
    e = environment(torch.device("cpu"))
    return (
        f"{e['cpu']}, {e['cpu_count']} cores, {e['threads']} threads; python {e['python']}, "
        f"torch {e['torch']}, transformers {e['transformers']}, secateur {e['secateur']}; "
        f"{datetime.date.today().isoformat()}"
    )


def keep(name: str, protocol: dict[str, Any], rows: list[dict[str, Any]]) -> Path:
    """Write rows with their protocol; returns the file."""
    RESULTS.mkdir(exist_ok=True)
    file = RESULTS / f"{name}.json"
    content = {"heading": heading(), "protocol": protocol, "rows": rows}
    file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    return file


def known_rows(name: str) -> list[dict[str, Any]]:
    """All finished rows of a table, those of other processes too."""
    file = RESULTS / f"{name}.json"
    if not file.exists():
        return []
    rows: list[dict[str, Any]] = json.loads(file.read_text(encoding="utf-8"))["rows"]
    return rows


def add(name: str, protocol: dict[str, Any], row: dict[str, Any]) -> None:
    """Add a row, and where and when it was measured; several processes may do so at once."""
    RESULTS.mkdir(exist_ok=True)
    folder = os.open(RESULTS, os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        keep(name, protocol, [*known_rows(name), {**row, "measured": heading()}])
    finally:
        os.close(folder)  # which gives the lock back


def markdown(columns: list[str], rows: list[list[str]]) -> str:
    """A table as it stands in README.md."""
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    lines += ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join(lines)
