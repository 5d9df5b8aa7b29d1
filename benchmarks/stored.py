"""The results of benchmarks, as files; the standard library alone, for any environment."""

from __future__ import annotations

import fcntl
import json
import os
import subprocess
import sys
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
    """Write all rows, with the script that runs; a new row with the commit that it measures.

    Returns:
        The file.
    """
    RESULTS.mkdir(exist_ok=True)
    file = RESULTS / f"{name}.json"
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short=8", "HEAD"]
    head = subprocess.run(command, check=False, capture_output=True, text=True).stdout.strip()
    rows = [{**row, "commit": row.get("commit", head or "unknown")} for row in rows]
    script = sys.modules["__main__"].__spec__
    assert script is not None, "run it as python -m benchmarks.FOLDER.SCRIPT"
    content = {
        "heading": heading, "script": script.name, "protocol": protocol, "rows": rows,
    }  # fmt: skip
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
