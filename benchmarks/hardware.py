"""What a benchmark was run on, and where its results go."""

from __future__ import annotations

import datetime
import json
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


def markdown(columns: list[str], rows: list[list[str]]) -> str:
    """A table as it stands in README.md."""
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    lines += ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join(lines)
