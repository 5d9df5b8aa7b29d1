"""What training brings back: pruned and cut SmolLM2-135M, trained for some minutes on two cores.

    python -m benchmarks.quality.recovery --calibration c4.jsonl \\
        --train C4=c4.jsonl WikiText-2=wiki-train.txt --text WikiText-2=wiki.txt C4=held-out.txt

Protocol: SmolLM2-135M is pruned (64 windows of 512 tokens of the calibration file, `random-crop`,
seed 0, preset `balanced`), then trained for `--minutes` by `secateur train`: on the next token, or
with the dense model as teacher ("half" counts the next token as much as the teacher). All get the
same time, the same `--batch`, and else the default recipe, with the embeddings (here the output
head too) left as they are if `--frozen`. They read the files of `--train` (without it the
calibration file), as many windows of each as the shortest gives. Judged like all else
here: the first 24 non-overlapping windows of 2048 tokens of each text, float32. Recovered = 1 −
excess after / excess before, excess = ln(perplexity) − ln(dense perplexity). The judged texts are
not trained on, nor watched.

Every finished row is kept in `results/recovery.json` at once and skipped when it is there; a
training that was stopped goes on. With `--models` the pruned and trained folders are kept too. On a
machine with other work, `OMP_NUM_THREADS=1` and twice the minutes are the same budget.
"""

from __future__ import annotations

import argparse
import math
import tempfile
from pathlib import Path
from typing import Any

import torch
from benchmarks.hardware import heading, keep, markdown
from benchmarks.stored import alone, known_rows

import secateur

MEASURES = ("src/secateur/training",)
PROOF = ("llama/balanced", "llama/train", "llama/teacher")
MINUTES = 140

MODEL = "smollm2-135m"
STARTS: dict[str, dict[str, Any]] = {
    "2:4": {"pattern": "2:4"},
    "60 %": {"sparsity": 0.6},
    "a quarter cut": {"keep_parameters": 0.75},
}
"""What is taken of the dense model first; the last one by `secateur structure`."""
MODES: dict[str, dict[str, Any]] = {
    "next token": {},
    "teacher": {"teacher": MODEL},
    "teacher, half": {"teacher": MODEL, "next_token": 0.5},
}
FROZEN = {"rates": {"*embed*": 0.0}}
Row = dict[str, Any]
Texts = dict[str, str]
"""Files by name."""


def started(args: argparse.Namespace, start: str, models: Path) -> Path:
    """The folder of a pruned or cut model."""
    folder = models / ("start-" + start.strip(" %").replace(":", "-").replace(" ", "-"))
    if not folder.exists():
        take = secateur.structure if "keep_parameters" in STARTS[start] else secateur.prune
        take(
            MODEL,
            output=folder,
            calibration=args.calibration,
            windows=64,
            sequence_length=512,
            packing="random-crop",
            **STARTS[start],
        )
    return folder


def files(named: list[str]) -> Texts:
    """NAME=FILE, one or more, taken apart."""
    return dict(text.split("=", 1) for text in named)


def judged(args: argparse.Namespace, model: str | Path) -> dict[str, float]:
    """Perplexity by text."""
    return {
        name: secateur.evaluate(
            str(model), text=text, sequence_length=2048, windows=args.windows
        ).perplexity
        for name, text in files(args.text).items()
    }


def trained(args: argparse.Namespace, start: str, mode: str, texts: Texts, models: Path) -> Row:
    """One training and what it brought."""
    minutes, folder = args.minutes, started(args, start, models)
    read = " and ".join(texts)
    frozen = "-frozen" if args.frozen else ""
    name = f"{folder.name}-{mode}-{minutes:g}-{read}{frozen}"
    output = models / name.replace(",", "").replace(" ", "-")
    stopped = output.with_name(output.name + ".partial").exists()
    report = secateur.train(
        folder,
        output=output,
        resume=stopped,
        text=list(texts.values()),
        minutes=minutes,
        batch=args.batch,
        validations=2,
        **MODES[mode],
        **(FROZEN if args.frozen else {}),
    )
    return {
        "start": start,
        "way": mode,
        "read": read,
        "minutes": minutes,
        "frozen": args.frozen,
        "threads": torch.get_num_threads(),
        "batch": args.batch,
        "steps": report.steps,
        "tokens": report.tokens,
        "seconds": report.manifest.cost.training_seconds,
        "peak_resident_bytes": report.manifest.cost.peak_resident_bytes,
        "sparsity": report.sparsity,
        "perplexity": judged(args, output),
    }


def same(row: Row, *asked: Any) -> bool:
    """Whether a row is this one: its start, way, text, minutes, and whether embeddings stayed."""
    return tuple(row[part] for part in ("start", "way", "read", "minutes", "frozen")) == asked


def recovered(rows: list[Row]) -> tuple[list[str], list[list[str]]]:
    """Perplexity, and in brackets the part of the excess loss that came back."""
    dense = next(r["perplexity"] for r in rows if r["start"] == "dense")
    lines = []
    for row in rows:
        cells = [row["start"], row["way"], f"{row['tokens']:,}" if row["tokens"] else ""]
        before = [r for r in rows if same(r, row["start"], "", "", 0, False)]
        for text, value in row["perplexity"].items():
            back = ""
            if row["way"]:
                excess = math.log(before[0]["perplexity"][text] / dense[text])
                back = f" ({1 - math.log(value / dense[text]) / excess:.0%})"
            cells.append(f"{value:.2f}{back}")
        lines.append(cells)
    return ["", "learns from", "tokens read", *dense], lines


TABLES = {"recovered": recovered}


def main() -> None:
    """Prune, train, judge, row by row."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--calibration", default="boolq-calibration")
    parser.add_argument("--train", nargs="*", default=[], help="NAME=FILE, one or more")
    parser.add_argument("--text", nargs="+", default=["BoolQ=boolq-held-out"])
    parser.add_argument("--windows", type=int, default=24)
    parser.add_argument("--minutes", type=float, default=20.0)
    parser.add_argument("--batch", type=int, default=1, help="windows of 512 tokens in a step")
    parser.add_argument("--frozen", action="store_true", help="embeddings are not trained")
    parser.add_argument("--models", type=Path, help="an existing folder that keeps the models")
    parser.add_argument("--starts", nargs="*", default=[*STARTS], choices=[*STARTS])
    parser.add_argument("--ways", nargs="*", default=[*MODES], choices=[*MODES])
    args = parser.parse_args()
    print(heading())
    protocol = {"windows": args.windows, "sequence_length": 2048,
                "calibration": "64 x 512, random-crop, seed 0"}  # fmt: skip

    def add(row: Row) -> None:
        order = ["dense", *STARTS]
        with alone():
            rows = sorted([*known_rows("recovery"), row], key=lambda r: order.index(r["start"]))
            keep("recovery", protocol, rows)
        print(row, flush=True)

    def untrained(start: str, model: str | Path) -> None:
        if not any(same(r, start, "", "", 0, False) for r in known_rows("recovery")):
            add({"start": start, "way": "", "read": "", "minutes": 0, "tokens": 0,
                 "frozen": False, "perplexity": judged(args, model)})  # fmt: skip

    with tempfile.TemporaryDirectory() as scratch:
        models = args.models or Path(scratch)
        texts = files(args.train) or {"calibration": args.calibration}
        read = " and ".join(texts)
        untrained("dense", MODEL)
        for start in args.starts:
            untrained(start, started(args, start, models))
            for mode in args.ways:
                asked = (start, mode, read, args.minutes, args.frozen)
                if not any(same(r, *asked) for r in known_rows("recovery")):
                    add(trained(args, start, mode, texts, models))
    print(markdown(*recovered(known_rows("recovery"))))


if __name__ == "__main__":
    main()
