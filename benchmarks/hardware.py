"""What a benchmark was run on, kept with its results."""

from __future__ import annotations

import datetime
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import torch
from benchmarks.stored import Rows, alone, known_rows, write_rows

from secateur.runs.environment import environment


def heading() -> str:
    """One line on hardware, versions and day."""
    e = environment(torch.device("cpu"))
    return (
        f"{e['cpu']}, {e['cpu_count']} cores, {e['threads']} threads; python {e['python']}, "
        f"torch {e['torch']}, transformers {e['transformers']}, secateur {e['secateur']}; "
        f"{datetime.date.today().isoformat()}"
    )


def keep(name: str, protocol: dict[str, Any], rows: Rows) -> Path:
    """Write rows with their protocol; returns the file."""
    return write_rows(name, heading(), protocol, rows)


def add(name: str, protocol: dict[str, Any], row: dict[str, Any]) -> None:
    """Add a row, and where and when it was measured; several processes may do so at once."""
    with alone():
        keep(name, protocol, [*known_rows(name), {**row, "measured": heading()}])


def markdown(columns: list[str], rows: list[list[str]]) -> str:
    """A table as it stands in README.md."""
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    lines += ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join(lines)


@contextmanager
def watched_memory(process: int | None = None) -> Iterator[list[int]]:
    """The resident bytes of a process, of this one if none is named; read twice a second."""
    watched, done = psutil.Process(process), threading.Event()
    seen = [watched.memory_info().rss]

    def watch() -> None:
        while not done.wait(0.5):
            seen.append(watched.memory_info().rss)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield seen
    finally:
        done.set()
        watcher.join()
