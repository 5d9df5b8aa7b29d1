"""What a diagnosis says of SmolLM2-135M as it is, pruned well, and pruned badly.

    python -m benchmarks.quality.diagnosis

Each model is pruned on 16 windows of 256 tokens of `boolq-calibration` and diagnosed beside the
dense one on the default text. Errors and warnings are told by id; notes are not.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from benchmarks.hardware import heading, keep, markdown

import secateur

MEASURES = ("src/secateur/diagnostics",)

MODEL = "smollm2-135m"
PRUNED: dict[str, dict[str, Any]] = {
    "SparseGPT, 50 %": {"method": "sparsegpt", "sparsity": 0.5},
    "Wanda, 50 %": {"method": "wanda", "sparsity": 0.5},
    "SparseGPT, 2:4": {"method": "sparsegpt", "pattern": "2:4"},
    "Wanda, 2:4": {"method": "wanda", "pattern": "2:4"},
    "magnitude, 50 %": {"method": "magnitude", "sparsity": 0.5},
    "Wanda, 80 %": {"method": "wanda", "sparsity": 0.8},
}


def diagnosed(name: str, model: str) -> dict[str, Any]:
    """The worst of the layers, and what is found."""
    found = secateur.diagnose(model, dense=MODEL)
    return {
        "model": name,
        "largest_own_error": max(x.own_error for x in found.drift),
        "least_contribution": min(x.contribution for x in found.drift),
        "last_cosine": found.drift[-1].cosine,
        "findings": [f"{x.severity} {x.id}" for x in found.findings if x.severity != "note"],
    }


def layers(rows: list[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """The worst layer of each model, and what is found beside notes."""
    keys = ("largest_own_error", "least_contribution", "last_cosine")
    columns = ["", "largest own error", "least contribution", "cosine of the last layer", "found"]
    return columns, [
        [row["model"], *(f"{row[key]:.2f}" for key in keys), ", ".join(row["findings"])]
        for row in rows
    ]


TABLES = {"layers": layers}


def main() -> None:
    """Prune, diagnose, print."""
    print(heading())
    rows = [diagnosed("dense", MODEL)]
    with tempfile.TemporaryDirectory() as scratch:
        for name, options in PRUNED.items():
            folder = Path(scratch) / str(len(rows))
            secateur.prune(
                MODEL,
                output=folder,
                calibration="boolq-calibration",
                windows=16,
                sequence_length=256,
                **options,
            )
            rows.append(diagnosed(name, str(folder)))
    keep("diagnosis", {"protocol": __doc__}, rows)
    print(markdown(*layers(rows)))


if __name__ == "__main__":
    main()
