"""What training brings back: pruned and cut SmolLM2-135M, trained on 65,536 tokens.

    python -m benchmarks.quality.recovery --calibration c4.jsonl \\
        --train C4=c4.jsonl WikiText-2=wiki-train.txt --text WikiText-2=wiki.txt C4=held-out.txt

Protocol: SmolLM2-135M is pruned or cut (64 windows of 512 tokens of the calibration file,
`random-crop`, seed 0, preset `balanced`), then trained by `secateur train` for `--steps` steps of
one window: on the next token, or with the dense model as teacher ("half" counts the next token as
much as the teacher). The embeddings, here the output head too, stay as they are. All read the files
of `--train` (without it the calibration file), as many windows of each as the shortest gives.
Judged on the first 4 non-overlapping windows of 2048 tokens of each text, float32. Recovered = 1 −
excess after / excess before, excess = ln(perplexity) − ln(dense perplexity). The judged texts are
not trained on, nor watched. One thread; other work may run on another core.

Every finished row is kept in `results/recovery.json` at once and skipped when it is there; a
training that was stopped goes on. With `--models` the pruned and trained folders are kept too.
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
MINUTES = 60

MODEL = "smollm2-135m"
STARTS: dict[str, dict[str, Any]] = {
    "2:4": {"pattern": "2:4"},
    "a quarter cut": {"keep_parameters": 0.75},
}
"""What is taken of the dense model first; the last one by `secateur structure`."""
WAYS: dict[str, dict[str, Any]] = {
    "next token": {},
    "teacher, half": {"teacher": MODEL, "next_token": 0.5},
}
ROWS = (("2:4", "next token"), ("2:4", "teacher, half"), ("a quarter cut", "teacher, half"))
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


def trained(args: argparse.Namespace, start: str, way: str, texts: Texts, models: Path) -> Row:
    """One training and what it brought."""
    folder = started(args, start, models)
    output = models / f"{folder.name}-{way}".replace(",", "").replace(" ", "-")
    stopped = output.with_name(output.name + ".partial").exists()
    report = secateur.train(
        folder,
        output=output,
        resume=stopped,
        text=list(texts.values()),
        steps=args.steps,
        batch=1,
        validations=2,
        rates={"*embed*": 0.0},
        **WAYS[way],
    )
    return {
        "start": start,
        "way": way,
        "read": " and ".join(texts),
        "steps": report.steps,
        "tokens": report.tokens,
        "seconds": report.manifest.cost.training_seconds,
        "peak_resident_bytes": report.manifest.cost.peak_resident_bytes,
        "sparsity": report.sparsity,
        "perplexity": judged(args, output),
    }


def same(row: Row, start: str, way: str) -> bool:
    """Whether a row is this one."""
    return (row["start"], row["way"]) == (start, way)


def recovered(rows: list[Row]) -> tuple[list[str], list[list[str]]]:
    """Perplexity, and in brackets the part of the excess loss that came back."""
    dense = next(r["perplexity"] for r in rows if r["start"] == "dense")
    lines = []
    for row in rows:
        cells = [row["start"], row["way"], f"{row['tokens']:,}" if row["way"] else ""]
        before = [r for r in rows if same(r, row["start"], "")]
        for text, value in row["perplexity"].items():
            back = ""
            if row["way"]:
                excess = math.log(before[0]["perplexity"][text] / dense[text])
                back = f" ({1 - math.log(value / dense[text]) / excess:.0%})"
            cells.append(f"{value:.2f}{back}")
        lines.append(cells)
    return ["", "learns from", "tokens read", *dense], lines


TABLES = {"recovered": recovered}


def parser_of(description: str) -> argparse.ArgumentParser:
    """A parser with the texts, the steps and the judge."""
    parser = argparse.ArgumentParser(description=description.splitlines()[0])
    parser.add_argument("--calibration", default="boolq-calibration")
    parser.add_argument("--train", nargs="*", default=[], help="NAME=FILE, one or more")
    parser.add_argument("--text", nargs="+", default=["BoolQ=boolq-held-out"])
    parser.add_argument("--windows", type=int, default=4)
    parser.add_argument("--steps", type=int, default=128, help="of one window of 512 tokens")
    parser.add_argument("--models", type=Path, help="an existing folder that keeps the models")
    return parser


def main() -> None:
    """Prune, train, judge, row by row."""
    args = parser_of(__doc__).parse_args()
    torch.set_num_threads(1)
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
        if not any(same(r, start, "") for r in known_rows("recovery")):
            add({"start": start, "way": "", "perplexity": judged(args, model)})

    with tempfile.TemporaryDirectory() as scratch:
        models = args.models or Path(scratch)
        texts = files(args.train) or {"calibration": args.calibration}
        untrained("dense", MODEL)
        for start, way in ROWS:
            untrained(start, started(args, start, models))
            if not any(same(r, start, way) for r in known_rows("recovery")):
                add(trained(args, start, way, texts, models))
    print(markdown(*recovered(known_rows("recovery"))))


if __name__ == "__main__":
    main()
