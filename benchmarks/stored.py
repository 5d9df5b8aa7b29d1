"""The results of benchmarks, as files; the standard library alone, for any environment."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"

Rows = list[dict[str, Any]]


def known_rows(name: str, protocol: dict[str, Any] | None = None, heading: str = "") -> Rows:
    """All finished rows of a table, those of other processes too; none of another protocol or of
    other hardware, where these are given."""
    file = RESULTS / f"{name}.json"
    if not file.exists():
        return []
    known = json.loads(file.read_text(encoding="utf-8"))
    other = protocol is not None and known["protocol"] != protocol
    if other or (heading and known["heading"] != heading):
        return []
    rows: Rows = known["rows"]
    return rows


def write_rows(name: str, heading: str, protocol: dict[str, Any], rows: Rows) -> Path:
    """Write all rows; returns the file."""
    RESULTS.mkdir(exist_ok=True)
    file = RESULTS / f"{name}.json"
    content = {"heading": heading, "protocol": protocol, "rows": rows}
    file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    return file


@contextmanager
def alone() -> Iterator[None]:
    """While no other process changes results: for reading rows and writing them with one more."""
    RESULTS.mkdir(exist_ok=True)
    folder = os.open(RESULTS, os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        yield
    finally:
        os.close(folder)  # which gives the lock back
