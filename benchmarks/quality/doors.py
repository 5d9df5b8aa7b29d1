"""Pruning at once, while a model is trained, and in rounds, on SmolLM2-135M with a small budget.

    python -m benchmarks.quality.doors --calibration c4.jsonl --train wiki-train.txt --text wiki.txt

Protocol: all rows end at `--sparsity` in every matrix of the decoder. `one-shot` rows are not
trained. All others take `--steps` steps of the optimizer in total, of one window of `--length`
tokens each, from the file of `--train`, with the embeddings frozen, the default learning rate and
no validation; so they read the same number of tokens, and what differs is when the zeros come.
Iterative pruning divides the steps among four rounds, and rewinds the rate. One-shot pruning
calibrates on 8 windows of 512 tokens of `--calibration`, seed 0. Judged by the first `--windows` windows of 1024 tokens of the text,
float32. The judged text is not trained on.

Every finished row is kept in `results/doors.json` at once, and skipped when it is there. The times
are not compared: other work ran on the machine.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from benchmarks.hardware import add, heading, markdown
from benchmarks.stored import known_rows

import secateur

MEASURES = ("src/secateur/training",)
PROOF = ("llama/wanda", "llama/train", "llama/gradual", "llama/iterative", "llama/learned cut")
MINUTES = 10

MODEL = "smollm2-135m"
Row = dict[str, Any]


class Doors:
    """The rows, by name; each makes a model's folder and returns what it read.

    Args:
        args: of the command line.
        folder: for the models.
    """

    def __init__(self, args: argparse.Namespace, folder: Path) -> None:
        self.args, self.folder = args, folder
        self.calibration: dict[str, Any] = {
            "calibration": args.calibration, "windows": 8, "sequence_length": 512
        }  # fmt: skip
        self.rows: dict[str, Callable[[Path], int]] = {
            "dense": self.dense,
            "magnitude, one-shot": self.magnitude,
            "wanda, one-shot": self.wanda,
            "magnitude, then train": lambda output: self.train(output, "magnitude, one-shot"),
            "wanda, then train": lambda output: self.train(output, "wanda, one-shot"),
            "gradual": lambda output: self.train(
                output, gradual={"sparsity": args.sparsity, "every": 2}
            ),
            "iterative": self.iterative,
        }

    def place(self, name: str) -> Path:
        """The folder of a row's model."""
        return self.folder / name.replace(",", "").replace(" ", "-")

    def made(self, name: str) -> Path:
        """The folder of a row's model, which is made if it is not there."""
        if not self.place(name).exists():
            self.rows[name](self.place(name))
        return self.place(name)

    def dense(self, output: Path) -> int:
        """Nothing to do."""
        return 0

    def magnitude(self, output: Path) -> int:
        """The smallest weights of each matrix, at once."""
        secateur.prune(MODEL, output=output, method="magnitude", sparsity=self.args.sparsity)
        return 0

    def wanda(self, output: Path) -> int:
        """Wanda, at once."""
        options = {"method": "wanda", "sparsity": self.args.sparsity, **self.calibration}
        secateur.prune(MODEL, output=output, **options)
        return 0

    def iterative(self, output: Path) -> int:
        """Four rounds, which share the steps."""
        how = {"sparsity": self.args.sparsity, "rounds": 4}
        return self.train(output, steps=self.args.steps // 4, iterative=how)

    def train(self, output: Path, start: str = "dense", **options: Any) -> int:
        """Train a row's model; returns the tokens it read."""
        args = self.args
        values = {"steps": args.steps, **options}
        report = secateur.train(
            MODEL if start == "dense" else self.made(start),
            output=output,
            text=args.train,
            batch=1,
            sequence_length=args.length,
            windows=256,
            validation_windows=0,
            rates={"*embed*": 0.0},
            resume=True,
            **values,
        )
        return int(report.tokens)

    def row(self, name: str) -> Row:
        """Make a row's model, and judge it."""
        tokens = 0
        if name != "dense" and not self.place(name).exists():
            tokens = self.rows[name](self.place(name))
        elif name != "dense":
            tokens = self.args.steps * self.args.length * ("one-shot" not in name)
        model = MODEL if name == "dense" else str(self.place(name))
        judged = secateur.evaluate(
            model, text=self.args.text, sequence_length=1024, windows=self.args.windows
        )
        return {
            "name": name,
            "tokens": tokens,
            "perplexity": judged.perplexity,
            "threads": torch.get_num_threads(),
        }


def zeros(rows: list[Row]) -> tuple[list[str], list[list[str]]]:
    """The perplexity of every row."""
    return ["", "perplexity"], [[row["name"], f"{row['perplexity']:.1f}"] for row in rows]


TABLES = {"zeros": zeros}


def main() -> None:
    """Make, judge and keep, row by row."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--calibration", default="boolq-calibration")
    parser.add_argument("--train", default="boolq-calibration")
    parser.add_argument("--text", default="boolq-held-out")
    parser.add_argument("--windows", type=int, default=4)
    parser.add_argument("--sparsity", type=float, default=0.6)
    parser.add_argument("--steps", type=int, default=24, help="a multiple of 4")
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--models", type=Path, help="an existing folder that keeps the models")
    parser.add_argument("--only", nargs="*", help="names of rows")
    args = parser.parse_args()
    print(heading(), flush=True)
    named = ("windows", "sparsity", "steps", "length")
    protocol = {name: getattr(args, name) for name in named}
    protocol |= {"trained on": Path(args.train).name, "judged on": Path(args.text).name}
    with tempfile.TemporaryDirectory() as scratch:
        doors = Doors(args, args.models or Path(scratch))
        known = {row["name"] for row in known_rows("doors", protocol)}
        for name in args.only or doors.rows:
            if name not in known:
                row = doors.row(name)
                add("doors", protocol, row)
                print(row, flush=True)
    for shown in TABLES.values():
        print(markdown(*shown(known_rows("doors", protocol))))


if __name__ == "__main__":
    main()
